"""Prefill on several ranks: the workers, what each computes, and the front end's handle on them."""
