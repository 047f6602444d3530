"""How to spread a prefill: exchange, number of ranks and chunk size, from a fitted cost model."""
