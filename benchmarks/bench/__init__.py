"""samepage, the kernel's KSM and what people write by hand, measured beside one another on the same bytes."""
