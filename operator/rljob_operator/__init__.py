"""The Kubernetes operator. Empty until the cluster capability lands; see docs/design.md, section 7."""
