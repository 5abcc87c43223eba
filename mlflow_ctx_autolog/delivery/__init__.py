"""From a finished span to the store: spool, sender, recovery, and receipts of it all."""
