"""What keeps a run alive: one attempt after another, until it has ended."""
