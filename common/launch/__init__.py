"""The application that every launcher shares: flags, configurations, run folders, reports."""

from common.launch.app import Run as Run
from common.launch.app import launch as launch
from common.launch.host_memory import keep_freed_memory as keep_freed_memory
from common.launch.plots import Figure as Figure
from common.launch.plots import Line as Line
from common.launch.plots import line_from_metrics as line_from_metrics
from common.launch.report import Expectation as Expectation
from common.launch.report import Results as Results
from common.launch.report import Table as Table
from common.launch.report import write_report as write_report
from common.launch.workdir import RunFolder as RunFolder
