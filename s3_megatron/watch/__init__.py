"""What a person sees of a run; it knows no engine and no optimizer of ours, they feed it."""
