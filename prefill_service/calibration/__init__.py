"""``prefill-service calibrate``: measures what each head needs and writes its budget."""
