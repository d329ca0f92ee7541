"""Which batches an epoch has, who may compute them, and which are done. Pure; knows no Lightning."""
