"""For the pytest that runs the checks on the substitute driver: before anything imports the package."""

from tests.contracts.launcher import substitute

substitute.install()
