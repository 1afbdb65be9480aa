"""Features of a backbone to the levels that a head is shared by, finest first."""
