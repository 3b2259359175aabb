"""These files keep the stages running. Of this project's code they import only each other.

    ranks       torch.distributed for one process or many
    threads     how many threads torch has on a CPU, and how they wait
    flags       a dataclass becomes --flags
    run         a training run: folder, log, checkpoints and stops in one object
    folder      a run's folder: opened, refused or cleared
    checkpoint  saving in the background, and resuming
    signals     stop signals, and one message when a run fails
    log         metrics and logged rollouts of a step
    records     JSONL files of results that survive an interruption
    memory      the memory that a step needs (--dry_run)
    weights     models on disk, read so that no rank holds all of one
    family      does training compute what the model itself computes
    kernels     fewer, larger GPU kernels
    thin        rollouts on a thinner model, whose ranks go in step (--tp)
    balance     questions move between ranks, so that all train on about as many tokens
    attention   attention for packed sequences, prompts and decoded tokens
    decoder     KV cache, prefill, decode steps, CUDA graphs
    answers     is an answer right, can a gold be graded, does a plan give the answer away
    undone      which operations an expression leaves undone
    votes       maj@n: which answers are equal
    plans       how much a plan decides, and what that says about m and z
    grader      math-verify in bounded worker processes
    runner      programs and their tests: the judge's side
    sandbox     programs and their tests: processes that may only compute
    teacher     a teacher on an OpenAI-compatible server
    intervals   confidence intervals and a paired test
"""
