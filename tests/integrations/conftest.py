"""OpenMMLab logs every parameter that it initialises; here only warnings count."""

import pytest


@pytest.fixture(autouse=True)
def quiet_mmengine():
    logging = pytest.importorskip(
        "mmengine.logging", reason="OpenMMLab is not installed; run: sh tools/install_openmmlab.sh"
    )
    logging.MMLogger.get_instance("tests", log_level="WARNING")
