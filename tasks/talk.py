"""
Conversations with things to remember, for a model that is told something today and asked tomorrow (`sample.py --memory=FILE`).

    My dog is called Bruno.            Learn: seven grey owls rest under the bridge.        What is my cat called?
    I will remember.                   I will remember.                                     I do not know.
    What is my dog called?             Recite: seven grey
    Your dog is called Bruno.          owls rest under the bridge.

Lines take turns: what is said to the model, what it answers. Between them come sentences of other text, answered with "I see.".
Half of the values are spelled letter by letter, at random, so that any name will do. Whether a thing was told at all has to be
known too. `prepare.py talk` makes training rows of them.
"""
import numpy as np

THINGS = """dog cat horse parrot boat car house street school sister brother mother father uncle aunt cousin teacher doctor
neighbour friend boss baker village river bank hotel ship band team club garden robot""".split()
KINDS = """colour fruit drink animal city country song book film sport flower tree tool game number season stone bird fish
dish""".split()
LOCKS = """safe door gate bike phone locker cellar office suitcase garage shed alarm lift tower vault archive""".split()
NAMES = """Ada Alan Alice Anna Anton Bella Bruno Carl Clara Cora David Dora Edgar Ella Emil Emma Erik Eva Felix Finn Flora Frank
Frieda George Grace Greta Hanna Harry Helen Henry Hugo Ida Irene Iris Ivan Jack Jacob James Jane John Julia Karl Kate Laura Leo
Lily Lina Lisa Louis Lucy Luna Marie Mark Martha Max Mia Mila Milo Nina Nora Olga Oscar Otto Paul Paula Peter Petra Robert Rosa
Rose Ruby Sam Sarah Simon Sofia Stella Theo Thomas Toby Tom Vera Victor Walter Willa""".split()
WORDS = """red blue green yellow black white grey brown small large old new warm cold quiet loud seven three two ten owl owls
wolf bear fox apple pear plum cherry bread soup cheese coffee tea water milk river lake sea hill bridge castle market station
boat train lamp chair table window letter paper pencil music violin drum dance chess tennis summer winter spring autumn oak pine
rose lily stone iron gold silver paris london rome oslo lima cairo under over near behind before after walks runs sleeps sings
rest wait meet build carry paint write read the""".split()
# things to tell: which, what is said, what is asked, how the answer begins
FAMILIES = ((THINGS, 'My {} is called', 'What is my {} called?', 'Your {} is called'),
            (KINDS, 'My favourite {} is', 'What is my favourite {}?', 'Your favourite {} is'),
            (LOCKS, 'The code of the {} is', 'What is the code of the {}?', 'The code of the {} is'))
TOLD, SEEN, UNKNOWN = 'I will remember.\n', 'I see.\n', 'I do not know.\n'

VALUE = 1000  # weight of a value in the training loss, shared by its tokens, against 1 for every other token
FIRST = 8     # the first of them weigh most, 1/i down to 1/FIRST: they alone depend on what was asked
BEGIN = 100   # weight of an answer's first token, was it told or not, and of the word asked for, which it repeats
SAY = 8       # of each other token of an answer


def vocabulary():
    """Every word of these conversations that stands at the beginning of a line, or after a space."""
    lines = [text for family in FAMILIES for text in family[1:]] + [TOLD, SEEN, UNKNOWN, 'Learn:', 'Recite:']
    return ' \n'.join([*lines, ' '.join(['', *THINGS, *KINDS, *LOCKS, *NAMES, *WORDS])])


def draw_value(rng, family):
    """What a thing of a family is called: a code of digits, a known word, or letters."""
    if family == 2:
        return ' ' + ''.join(str(d) for d in rng.integers(0, 10, rng.integers(3, 6)))
    if rng.integers(2):
        return f' {rng.choice((NAMES, WORDS)[family])}'
    letters = ''.join(chr(ord('a') + c) for c in rng.integers(0, 26, rng.integers(3, 8)))
    return ' ' + (letters.capitalize() if family == 0 else letters)


def draw_phrase(rng, most):
    """Words in no order."""
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
        """What can only be known from memory: it counts most, its first tokens more than the rest."""
        ids = self.tokenizer.encode(text)
        shares = 1 / np.minimum(np.arange(1, len(ids) + 1), FIRST)
        self.ids += ids
        self.weights += np.round(VALUE * shares / shares.sum()).tolist()

    def answer(self, text, key=''):
        first, rest = text.split(' ', 1)
        before, _, after = f' {rest}'.partition(' {}')
        self.say(first, BEGIN)
        self.say(before, SAY)
        self.say(f' {key}' if key else '', BEGIN)
        self.say(after, SAY)

    def learn(self, words, cut, again):
        """A phrase asked for by its first `cut` words, or said `again`."""
        self.say(('Learn: ' if again else 'Recite: ') + ' '.join(words[:cut]) + '\n' * (not again))
        self.recall(' ' + ' '.join(words[cut:]) + '.')
        self.say('\n', SAY)
        if again:
            self.say(TOLD, SAY)


def conversation(rng, tokenizer, texts, length):
    """texts: lists of sentences, of which one comes between. -> ids (length,) and how much each counts as a target (length,)"""
    row, other = Row(tokenizer), texts[rng.integers(len(texts))]
    told, phrases, families = {}, [], rng.permutation(3)[:rng.integers(1, 4)].tolist()
    most, chatter = int(rng.integers(1, 7)), rng.uniform(0.1, 0.6)

    def draw_thing():
        family = int(rng.choice(families))
        return family, str(rng.choice(FAMILIES[family][0]))

    while len(row.ids) < length:
        known, chance = len(told) + len(phrases), rng.random()
        if known and rng.random() < chatter:
            row.say(' '.join(other[rng.integers(len(other))].split()[:40]) + '\n')
            row.say(SEEN, SAY)
        elif not known or (known < most and chance < 0.5):
            if rng.integers(4):
                family, key = draw_thing()  # told before: otherwise from here on
                told[family, key] = draw_value(rng, family)
                row.say(FAMILIES[family][1].format(key) + told[family, key] + '.\n')
            else:
                phrases.append(draw_phrase(rng, 16))
                row.say(f'Learn: {phrases[-1]}.\n')
            row.say(TOLD, SAY)
        elif chance > 0.85:  # what may not have been told
            family, key = draw_thing()
            if (family, key) not in told:
                row.say(FAMILIES[family][2].format(key) + '\n')
                row.answer(UNKNOWN)
        elif rng.integers(known) < len(told):
            family, key = list(told)[rng.integers(len(told))]
            row.say(FAMILIES[family][2].format(key) + '\n')
            row.answer(FAMILIES[family][3], key)
            row.recall(told[family, key] + '.')
            row.say('\n', SAY)
        else:
            words, again = phrases[rng.integers(len(phrases))].split(), rng.integers(2)
            row.learn(words, int(rng.integers(1, 3)), again)
    return np.array(row.ids[:length]), np.array(row.weights[:length], np.uint16)
