"""What our results are compared with: other people's code, run on the same inputs."""
