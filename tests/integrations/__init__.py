"""The tests of integrations/transformers. All need Transformers; those that need a later release say so themselves."""

import pytest

pytest.importorskip("transformers", minversion="4.57")
