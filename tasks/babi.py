"""
Stories in haystacks: generated bAbI (Weston et al., arXiv 1502.05698), qa1 to qa3, hidden in other
text as in BABILong (Kuratov et al., arXiv 2406.10149). It is not their data.

    Mary went to the kitchen. Mary took the football. Mary moved to the garden.
    qa1  Where is Mary? In the garden.
    qa2  Where is the football? In the garden.
    qa3  Where was the football before the garden? In the kitchen.

qa1 needs one fact, qa2 two, qa3 three. People walk about, and take and drop objects; an object that
is held goes where its holder goes. Facts stand in their order between the sentences of a haystack.
`prepare.py babi` makes training rows and an evaluation set; `eval_babi.py` evaluates a model.
"""
import collections
import re

import numpy as np

from nanotitans.seeds import generator

PLACES = """bathroom bedroom garden hallway kitchen office attic cellar garage park school
station""".split()
OBJECTS = """apple camera coat drum football hammer lamp milk mirror pillow towel
umbrella""".split()
PEOPLE = """Mary John Sandra Daniel Alice Bruno Carla Emma Felix Greta Henry Irene Ivan Julie Karl
Laura Oscar Paula Peter Rosa Simon Tina Victor Nina""".split()
MOVE = ('went to', 'moved to', 'journeyed to', 'travelled to', 'went back to')
TAKE = ('took', 'got', 'grabbed', 'picked up')
DROP = ('dropped', 'discarded', 'left', 'put down')
TASKS = {'qa1': 'Where is {}? In the', 'qa2': 'Where is the {}? In the',
         'qa3': 'Where was the {} before the {}? In the'}
# training rows also ask for what qa2 and qa3 are made of
STEPS = {'who': 'Who took the {}? It was', 'before': 'Where was {} before the {}? In the'}
FACTS = 20                             # of a story of the evaluation
ASKED = {'qa1': 4, 'qa2': 3, 'qa3': 3}  # questions about it


def vocabulary():
    """Every word that facts and questions can have."""
    frames = [*TASKS.values(), *STEPS.values()]
    return ' '.join(['', *PLACES, *OBJECTS, *PEOPLE, *MOVE, *TAKE, *DROP, *frames, '.'])


def held_out(person, thing):
    """Whether training rows never bring this person together with this place or object."""
    things = PLACES if thing in PLACES else OBJECTS
    return (PEOPLE.index(person) + things.index(thing)) % 4 == 0


class World:
    """
    Some people and objects, and what happens to them. With new_pairs=False nobody goes to a place,
    or takes an object, that training rows never bring together with this person.
    """

    def __init__(self, rng, people, objects, new_pairs):
        self.rng, self.people, self.objects, self.new_pairs = rng, people, objects, new_pairs
        self.path = {}    # person -> places, in order
        self.trail = {}   # object -> [(place, who brought it there)]
        self.taker = {}   # object -> who took it last
        self.held = {}    # object -> whether that person still has it

    def pick(self, items):
        return items[self.rng.integers(len(items))]

    def fact(self):
        """Let something happen. -> the sentence that tells it"""
        person = self.pick(self.people)
        here = self.path.get(person, [None])[-1]
        takes = [(thing, TAKE) for thing in self.objects if here and not self.held.get(thing)
                 and (thing not in self.trail or self.trail[thing][-1][0] == here)
                 and (self.new_pairs or not held_out(person, thing))]
        drops = [(thing, DROP) for thing, held in self.held.items()
                 if held and self.taker[thing] == person]
        if not takes + drops or self.rng.random() < 0.5:
            place = self.pick([place for place in PLACES if place != here
                               and (self.new_pairs or not held_out(person, place))])
            self.path.setdefault(person, []).append(place)
            for thing, _ in drops:
                self.trail[thing].append((place, person))
            return f' {person} {self.pick(MOVE)} the {place}.'
        # to take is more interesting than to drop at once
        thing, verbs = self.pick(takes if takes and self.rng.random() < 0.6 else takes + drops)
        if verbs is TAKE:
            self.taker[thing] = person
            self.trail.setdefault(thing, [(here, person)])
        self.held[thing] = verbs is TAKE
        return f' {person} {self.pick(verbs)} the {thing}.'

    def questions(self, task):
        """
        All questions of a task that have an answer. -> [(question, answer, whether training rows
        never bring together the person and the place or object that it is about)]
        """
        if task == 'qa1':
            return [(f' {TASKS[task].format(person)}', places[-1], held_out(person, places[-1]))
                    for person, places in self.path.items()]
        if task == 'qa2':
            return [(f' {TASKS[task].format(thing)}', trail[-1][0],
                     held_out(trail[-1][1], trail[-1][0]) or held_out(trail[-1][1], thing))
                    for thing, trail in self.trail.items()]
        if task == 'who':
            return [(f' {STEPS[task].format(thing)}', person, held_out(person, thing))
                    for thing, person in self.taker.items()]
        frame = (TASKS | STEPS)[task]
        paths = self.trail if task == 'qa3' else {
            person: [(place, person) for place in places] for person, places in self.path.items()}
        found = []
        for name, steps in paths.items():
            # of several visits the last counts
            last = {place: i for i, (place, _) in enumerate(steps)}
            found += [(f' {frame.format(name, place)}', steps[i - 1][0],
                       any(held_out(person, place) for place, person in steps[i - 1:i + 1]))
                      for place, i in last.items() if i]
        return found


# --------------------------------------------------------------------------------------------------
# evaluation


def evaluation_set(seed, samples=200):
    """
    -> {'stories': samples}, as text. A sample has 'facts' [sentence, depth in [0, 1]], 'questions'
    {task: [question, answer, whether it is about a new pair]}, and 'place', which picks the part of
    the text that is its haystack.
    """
    rngs = (generator('babi evaluation', seed, i) for i in range(samples))
    return {'stories': [evaluation_sample(rng) for rng in rngs]}


def evaluation_sample(rng):
    while True:
        people, objects = cast(rng, 4, 4)
        world = World(rng, people, objects, new_pairs=True)
        facts = [world.fact() for _ in range(FACTS)]
        questions = {}
        for task, asked in ASKED.items():
            found = world.questions(task)
            questions[task] = [found[i] for i in rng.permutation(len(found))[:asked]]
        if all(len(questions[task]) == asked for task, asked in ASKED.items()):
            depths = np.sort(rng.random(FACTS)).tolist()
            return {'facts': list(zip(facts, depths, strict=True)), 'questions': questions,
                    'place': float(rng.random())}


def guess(samples):
    """
    How often an answer is what can be guessed without reading the question: the place that is told
    last, or most often. -> {task: the larger of the two shares}
    """
    shares = {}
    for task in TASKS:
        hits = []
        for sample in samples:
            told = [word for fact, _ in sample['facts'] for word in re.findall(r'\w+', fact)
                    if word in PLACES]
            most, _ = collections.Counter(told).most_common(1)[0]
            hits += [(answer == told[-1], answer == most)
                     for _, answer, _ in sample['questions'][task]]
        shares[task] = float(np.mean(hits, 0).max())
    return shares


def cast(rng, people, objects):
    """-> names of so many people and objects"""
    return (rng.permutation(PEOPLE)[:people].tolist(),
            rng.permutation(OBJECTS)[:objects].tolist())


# --------------------------------------------------------------------------------------------------
# training rows

# weights in the training loss; every other token has weight 1
ANSWER_WEIGHT = 500
QUESTION_WEIGHT = 8
MIX = ('qa1', 'qa2', 'qa2', 'qa3', 'who', 'before')  # qa2 is learned last


def training_row(rng, tokenizer, haystack, length):
    """
    Draw a row of `length` tokens: a story in a haystack, with questions in between or, in half of
    the rows, all of them after the facts, which then go on for as long as in the evaluation.
    -> ids (length,), weights (length,): how much each token counts as a target
    """
    room, events, said = length * rng.uniform(0.5, 0.95), [], set()
    late, room_of_questions = rng.integers(2), room * rng.uniform(0.3, 0.6)
    people, objects = (4, 4) if late else (rng.integers(2, 6), rng.integers(1, 5))
    world = World(rng, *cast(rng, people, objects), new_pairs=False)
    while True:
        asked = None
        if rng.random() < (room < room_of_questions if late else 0.4):
            found = [q for q in world.questions(world.pick(MIX)) if q[:2] not in said]
            asked = world.pick(found)[:2] if found else None
        if asked:
            said.add(asked)
            ids = tokenizer.encode(f'{asked[0]} {asked[1]}.')
        else:
            ids = tokenizer.encode(world.fact())
        room -= len(ids)
        if room < 0:
            break
        weights = np.full(len(ids), QUESTION_WEIGHT if asked else 1, np.uint16)
        if asked:
            weights[-2] = ANSWER_WEIGHT
        events.append((ids, weights))
    rest = length - sum(len(ids) for ids, _ in events)
    depths = np.sort(rng.random(len(events))).tolist()
    inserts = [(depth, ids) for depth, (ids, _) in zip(depths, events, strict=True)]
    ids, weights = [], []
    for part, index in haystack.fill(haystack.place(rng.random()), rest, inserts):
        ids.append(part)
        weights.append(np.ones(len(part), np.uint16) if index is None else events[index][1])
    return np.concatenate(ids), np.concatenate(weights)
