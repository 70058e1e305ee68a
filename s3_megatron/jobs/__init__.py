"""From a recipe to a job that runs itself: what a login node does, and what runs on the nodes. Imports no torch."""
