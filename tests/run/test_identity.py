import hashlib

import torch

from memfit.run.identity import digest


def test_the_digest_is_of_the_elements_in_their_order_each_part_after_its_length():
    transposed = torch.arange(6, dtype=torch.int16).reshape(2, 3).t()
    data = bytes((0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0))
    expected = hashlib.sha256((12).to_bytes(8, "little") + data + (2).to_bytes(8, "little") + "ä".encode())
    assert digest([transposed, "ä"]) == expected.hexdigest()


def test_parts_that_are_divided_in_other_places_differ():
    found = {digest(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], [b"ab", b"c", b""], [])}
    assert len(found) == 5
    assert digest(["ab"]) == digest([b"ab"])


def test_single_numbers_empty_tensors_and_names_that_are_not_utf8_have_digests():
    odd = [torch.tensor(3), torch.zeros(0, 4), torch.tensor(True), torch.zeros(2, dtype=torch.bfloat16), "\udcff"]
    assert len({digest([part]) for part in odd}) == 5
