"""What runs on the nodes of a job, beside the ranks: the agent, its watchdog, and the checks before the start."""
