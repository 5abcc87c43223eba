"""What happens in a worker process: tasks, and the threads and processes that they start."""
