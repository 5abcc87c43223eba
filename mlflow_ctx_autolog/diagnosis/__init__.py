"""Why traces may be missing: facts from driver and workers, and what they mean."""
