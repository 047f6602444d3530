"""The gRPC front: servicers, errors, authentication, health, drain."""
