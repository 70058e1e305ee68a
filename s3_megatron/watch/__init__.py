"""What a person sees of a run; it knows no engine, engines feed it."""
