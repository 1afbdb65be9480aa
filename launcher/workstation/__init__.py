"""The queue of a machine that several runs share: its files, its order, and what there is to share."""
