"""What this machine and this user get: `facts` looks, `findings` says what that means and what to change.

`samepage doctor` prints all of it; `run`, `daemon` and `status` say the one line that stands in the way of merging.
"""
