"""The contract: the RLJob, its status, and every message. Imports pydantic only."""
