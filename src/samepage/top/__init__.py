"""`samepage top`: `view` makes the lines from what a service says, `app` shows them and takes keys, `source` asks."""
