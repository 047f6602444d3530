"""Processes of the ranks, seen from the front end, and the one that they are forked from."""
