"""
Conversations that train a model to remember what it was told (`sample.py --memory=FILE`).

    My dog is called Bruno.      Learn: grey owls rest under the bridge.      What is my cat called?
    I will remember.             I will remember.                             I do not know.
    What is my dog called?       Recite: grey owls
    Your dog is called Bruno.    rest under the bridge.

Lines alternate between the user and the model. In between, the user says sentences of other text
and the model answers "I see.". Half of the values are random letters, so that the model learns to
repeat any name, and some questions are about things that were never told. `prepare.py talk` makes
training rows.
"""
import numpy as np

THINGS = """dog cat horse parrot boat car house street school sister brother mother father uncle
aunt cousin teacher doctor neighbour friend boss baker village river bank hotel ship band team club
garden robot""".split()
KINDS = """colour fruit drink animal city country song book film sport flower tree tool game number
season stone bird fish dish""".split()
LOCKS = """safe door gate bike phone locker cellar office suitcase garage shed alarm lift tower
vault archive""".split()
NAMES = """Ada Alan Alice Anna Anton Bella Bruno Carl Clara Cora David Dora Edgar Ella Emil Emma
Erik Eva Felix Finn Flora Frank Frieda George Grace Greta Hanna Harry Helen Henry Hugo Ida Irene
Iris Ivan Jack Jacob James Jane John Julia Karl Kate Laura Leo Lily Lina Lisa Louis Lucy Luna Marie
Mark Martha Max Mia Mila Milo Nina Nora Olga Oscar Otto Paul Paula Peter Petra Robert Rosa Rose Ruby
Sam Sarah Simon Sofia Stella Theo Thomas Toby Tom Vera Victor Walter Willa""".split()
WORDS = """red blue green yellow black white grey brown small large old new warm cold quiet loud
seven three two ten owl owls wolf bear fox apple pear plum cherry bread soup cheese coffee tea water
milk river lake sea hill bridge castle market station boat train lamp chair table window letter
paper pencil music violin drum dance chess tennis summer winter spring autumn oak pine rose lily
stone iron gold silver paris london rome oslo lima cairo under over near behind before after walks
runs sleeps sings rest wait meet build carry paint write read the""".split()
# families of facts: things, statement, question, beginning of the answer
FAMILIES = (
    (THINGS, 'My {} is called', 'What is my {} called?', 'Your {} is called'),
    (KINDS, 'My favourite {} is', 'What is my favourite {}?', 'Your favourite {} is'),
    (LOCKS, 'The code of the {} is', 'What is the code of the {}?', 'The code of the {} is'))
TOLD, SEEN, UNKNOWN = 'I will remember.\n', 'I see.\n', 'I do not know.\n'

# weights in the training loss; what the user says has weight 1
VALUE = 1000  # of a value or the rest of a phrase, shared by its tokens
FIRST = 8     # token i of it has the share 1 / min(i, FIRST): the question decides token 1
BEGIN = 100   # of an answer's first token (was it told?) and of the thing that the answer names
SAY = 8       # of each other token of an answer


def vocabulary():
    """Every word of these conversations that begins a line or follows a space."""
    lines = [text for family in FAMILIES for text in family[1:]]
    lines += [TOLD, SEEN, UNKNOWN, 'Learn:', 'Recite:']
    return ' \n'.join([*lines, ' '.join(['', *THINGS, *KINDS, *LOCKS, *NAMES, *WORDS])])


def draw_value(rng, family):
    """Draw a value for a thing of a family, with a space before it: digits, a word or letters."""
    if family == 2:
        return ' ' + ''.join(str(d) for d in rng.integers(0, 10, rng.integers(3, 6)))
    if rng.integers(2):
        return f' {rng.choice((NAMES, WORDS)[family])}'
    letters = ''.join(chr(ord('a') + c) for c in rng.integers(0, 26, rng.integers(3, 8)))
    return ' ' + (letters.capitalize() if family == 0 else letters)


def draw_phrase(rng, most):
    """Draw a phrase of 4 to `most` words."""
    return ' '.join(str(word) for word in rng.choice(WORDS, rng.integers(4, most + 1)))


class Row:
    """The tokens of a conversation so far, and how much each counts as a target."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.weights = tokenizer, [], []

    def say(self, text, weight=1):
        ids = self.tokenizer.encode(text)
        self.ids += ids
        self.weights += [weight] * len(ids)

    def recall(self, text):
        """Add text that only the memory can know: it counts most, and its first tokens more."""
        ids = self.tokenizer.encode(text)
        shares = 1 / np.minimum(np.arange(1, len(ids) + 1), FIRST)
        self.ids += ids
        self.weights += np.round(VALUE * shares / shares.sum()).tolist()

    def answer(self, text, key=''):
        """Add an answer, with the key in place of {}."""
        first, rest = text.split(' ', 1)
        before, _, after = f' {rest}'.partition(' {}')
        self.say(first, BEGIN)
        self.say(before, SAY)
        if key:
            self.say(f' {key}', BEGIN)
        self.say(after, SAY)

    def tell_fact(self, family, key, value):
        self.say(FAMILIES[family][1].format(key) + value + '.\n')
        self.say(TOLD, SAY)

    def ask_fact(self, family, key, value):
        """value: None if the fact was not told"""
        self.say(FAMILIES[family][2].format(key) + '\n')
        if value is None:
            self.answer(UNKNOWN)
            return
        self.answer(FAMILIES[family][3], key)
        self.recall(value + '.')
        self.say('\n', SAY)

    def tell_phrase(self, phrase):
        self.say(f'Learn: {phrase}.\n')
        self.say(TOLD, SAY)

    def ask_phrase(self, words, cut, tell):
        """Give the first `cut` words of a phrase and ask for the rest; with `tell`, repeat it."""
        begin, rest = ' '.join(words[:cut]), ' '.join(words[cut:])
        self.say(f'Learn: {begin}' if tell else f'Recite: {begin}\n')
        self.recall(f' {rest}.')
        self.say('\n', SAY)
        if tell:
            self.say(TOLD, SAY)


def conversation(rng, tokenizer, texts, length):
    """
    Draw a row of training. texts: lists of sentences; one list is the other text of this row.
    -> ids (length,), weights (length,): how much each token counts as a target
    """
    row, other = Row(tokenizer), texts[rng.integers(len(texts))]
    told, phrases = {}, []
    families = rng.permutation(3)[:rng.integers(1, 4)].tolist()
    max_known, chatter = int(rng.integers(1, 7)), rng.uniform(0.1, 0.6)

    def draw_thing():
        family = int(rng.choice(families))
        return family, str(rng.choice(FAMILIES[family][0]))

    while len(row.ids) < length:
        known, chance = len(told) + len(phrases), rng.random()
        if known and rng.random() < chatter:
            row.say(' '.join(other[rng.integers(len(other))].split()[:40]) + '\n')
            row.say(SEEN, SAY)
        elif not known or (known < max_known and chance < 0.5):
            if rng.integers(4):
                thing = draw_thing()  # if it was told before, the new value replaces the old one
                told[thing] = draw_value(rng, thing[0])
                row.tell_fact(*thing, told[thing])
            else:
                phrases.append(draw_phrase(rng, 16))
                row.tell_phrase(phrases[-1])
        elif chance > 0.85:
            thing = draw_thing()
            if thing not in told:
                row.ask_fact(*thing, None)
        elif rng.integers(known) < len(told):
            thing = list(told)[rng.integers(len(told))]
            row.ask_fact(*thing, told[thing])
        else:
            words, tell = phrases[rng.integers(len(phrases))].split(), rng.integers(2)
            row.ask_phrase(words, int(rng.integers(1, 3)), tell)
    return np.array(row.ids[:length]), np.array(row.weights[:length], np.uint16)
