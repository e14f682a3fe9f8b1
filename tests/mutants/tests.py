"""Run the tests of the files that are named, or of the files that differ from the commit."""
import shlex
import subprocess
import sys

MODEL = ("test_oracles.py test_memory.py test_training.py test_model.py"
         " -k 'not compiled and not 32k'")
# Arguments of pytest, which stops at the first failure: the tests that notice most come first, and
# slow tests that notice nothing more are left out.
TESTS = {
    'model.py': MODEL, 'memory.py': MODEL,
    'nanotitans/deep.py': "test_memory.py test_model.py -k 'depth or deep'",
    'nanotitans/sampling.py': "test_model.py test_training.py -k 'sampling or greedy or repetition"
                              " or temperature'",
    **{f'nanotitans/kernels/{name}.py': "test_kernels.py test_oracles.py test_memory.py"
       for name in ('__init__', 'elementary', 'blocks', 'loop', 'native')},
    'train.py': "test_training.py test_train.py test_parallel.py test_cli.py test_faults.py -k '"
                "(test_train and not no_nan and not canary and not interrupt) or doc_reset"
                " or carried_document or carry_state or wrong_flag or not_use or where_a_run"
                " or foreign or eval_only or other_data or unprepared or set_aside'",
    'nanotitans/dataset.py': "test_data.py test_seeds.py test_train.py test_parallel.py test_cli.py"
                             " -k 'test_seeds or replaced_half or what_prepare or meta_json"
                             " or lacks or bit_is_found or contiguous or weighted or documents"
                             " or damaged_data or decode or characters or unprepared"
                             " or prepare_text or prepare_refuses or not_installed"
                             " or resume_continues'",
    'nanotitans/checkpoint.py': "test_train.py test_cli.py test_faults.py test_conversation.py"
                                " test_parallel.py -k 'resume or checkpoint or disk_leaves"
                                " or system_refuses or swept or unfinished or files_from"
                                " or as_if_never or damaged_file or makes_no_sense"
                                " or shards_to_one_file'",
    'sample.py': "test_conversation.py test_cli.py -k '(test_conversation and not signal)"
                 " or sample_refuses or seeded'",
    'eval_context.py': "test_needle.py -k context",
    'eval_learning.py': "test_talk.py", 'eval_needle.py': "test_needle.py",
    'eval_rows.py': "test_recall.py", 'eval_talk.py': "test_talk.py",
}


def run(file):
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider']
    return subprocess.call(command + [f'tests/{word}' if word.endswith('.py') else word
                                      for word in shlex.split(TESTS[file])])


if __name__ == '__main__':
    diff = ['git', 'diff', '--name-only']
    broken = sys.argv[1:] or subprocess.check_output(diff, text=True).split()
    sys.exit(any(run(file) for file in broken))
