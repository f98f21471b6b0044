"""What other libraries take for the same work. Each script runs in an environment of its own (see `README.md` here)."""
