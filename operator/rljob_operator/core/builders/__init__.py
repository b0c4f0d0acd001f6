"""One builder a kind: from the job to the body of a child."""
