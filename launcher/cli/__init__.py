"""The command `launch`: one verb a function, and what the verbs do and show."""
