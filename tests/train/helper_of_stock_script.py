"""What a script imports from its own folder."""

GREETING = "found its own folder"
