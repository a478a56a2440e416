"""`python -m hyperconv_ext`: versions, devices and backends of this machine."""

from .report import environment

print(environment())
