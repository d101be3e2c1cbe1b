"""Any network on fake tensors: what one micro batch makes a rank do, and how much memory it needs. Needs no accelerator."""

from lm_train.trace.tracing import reason_of, trace

__all__ = ["reason_of", "trace"]
