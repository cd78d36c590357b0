"""Metadata lives in pyproject.toml; this file lets tools that look for a setup.py find one."""

from setuptools import setup

setup()
