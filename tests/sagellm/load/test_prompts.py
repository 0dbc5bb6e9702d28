from sagellm.load.workload import BLOCK_LEN, Prompts


def test_ids_have_the_length_and_the_range() -> None:
    ids = Prompts("ids", seed=0, vocab_size=10).make(0, 1000)
    assert len(ids) == 1000
    assert set(ids) == set(range(10))


def test_words_have_the_length() -> None:
    made = Prompts("words", seed=0).make(0, 30)
    assert isinstance(made, str)
    assert len(made.split(" ")) == 30


def test_a_prompt_depends_on_seed_and_number_alone() -> None:
    made = Prompts("ids", seed=1).make(5, 20)
    again = Prompts("ids", seed=1)
    again.make(4, 7)
    assert again.make(5, 20) == made
    assert again.make(6, 20) != made
    assert Prompts("ids", seed=2).make(5, 20) != made


def test_equal_blocks_are_equal_tokens() -> None:
    prompts = Prompts("ids", seed=0)
    first, second = prompts.make(0, 1100, (7, 8, 9)), prompts.make(1, 1100, (7, 8, 10))
    assert len(first) == len(second) == 1100
    assert first[: 2 * BLOCK_LEN] == second[: 2 * BLOCK_LEN]
    assert first[2 * BLOCK_LEN :] != second[2 * BLOCK_LEN :]


def test_blocks_are_cut_and_filled_to_the_length() -> None:
    prompts = Prompts("ids", seed=0)
    assert prompts.make(0, 100, (7, 8)) == prompts.make(1, 100, (7,))
    longer = prompts.make(0, BLOCK_LEN + 50, (7,))
    assert len(longer) == BLOCK_LEN + 50
    assert longer[BLOCK_LEN:] != prompts.make(1, BLOCK_LEN + 50, (7,))[BLOCK_LEN:]


def test_words_of_equal_blocks_are_equal() -> None:
    prompts = Prompts("words", seed=0)
    assert prompts.make(0, 40, (1,)) == prompts.make(1, 40, (1,))
