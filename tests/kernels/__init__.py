"""Other kernels than this machine's, in virtual machines."""
