"""Domains: labelled images in memory, from the embedded digits, published data sets, folders and arrays."""

from pden.data.domain import Domain, from_dataset
from pden.data.home import Home
from pden.data.load import load_domain, parse_target

__all__ = ["Domain", "Home", "from_dataset", "load_domain", "parse_target"]
