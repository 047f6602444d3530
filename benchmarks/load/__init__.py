"""The service and vLLM alone under the same arrivals: waiting times, throughput, memory."""
