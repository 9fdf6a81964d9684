"""For the pytest that runs the checks on the substitute driver: before anything imports the package."""

from tests.launcher import substitute

substitute.install()
