"""Ready-to-run configurations, and the modules and datamodules that they name."""
