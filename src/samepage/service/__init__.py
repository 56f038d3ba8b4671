"""The service: who may join, the wire to the agents, the thread that runs ksmd, and the control connections.

Nothing is imported here, so that a command which only asks a service something need not load numpy.
"""
