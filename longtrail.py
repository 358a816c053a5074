"""The command line: one click group assembled from one list of commands per folder."""

import logging
import os
from pathlib import Path

import click

from feature_repo import cli as feature_commands
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import DEFAULT_HOME, HOME_VARIABLE, Home

PROFILE_VARIABLE = "LONGTRAIL_PROFILE"
