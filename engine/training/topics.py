"""What invented conversations are about: topics, tasks and system lines, combined at random.

The lists exist to spread the text; they name no data set. Everything is drawn from the caller's generator, so a seed
gives the same sequence.
"""

from random import Random

__all__ = ["draw_request", "draw_system_line", "draw_topic"]

_SUBJECTS = """
astronomy|gardening|the French Revolution|sourdough bread|machine learning|the stock market|volcanoes|chess|jazz music|
the human heart|recycling|ancient Rome|photography|electric cars|the immune system|coffee|job interviews|black holes|
poetry|Python programming|JavaScript|SQL databases|home insurance|yoga|climate change|the Cold War|hiking|
time management|
cats|dogs|beekeeping|the water cycle|fractions|probability|linear equations|geometry|the solar system|photosynthesis|
DNA|vaccines|sleep|stress|friendship|public speaking|learning a language|Spanish cooking|Italian food|vegetarian meals|
a birthday party|a wedding|moving to a new city|saving money|renting a flat|buying a used car|bicycles|trains|airports|
Japan|Brazil|Egypt|Kenya|India|Canada|Iceland|the Amazon rainforest|coral reefs|whales|dinosaurs|bees|wolves|horses|
robots|computer security|passwords|operating systems|web design|mobile phones|video games|board games|football|
basketball|swimming|running a marathon|weight training|nutrition|allergies|headaches|first aid|dentists|eyesight|
childhood|raising teenagers|school exams|university|history essays|philosophy|ethics|logic puzzles|riddles|jokes|
Shakespeare|fairy tales|science fiction|detective stories|dragons|pirates|ghosts|knights|wizards|space travel|
time travel|
painting|sculpture|architecture|museums|opera|guitars|pianos|singing|film making|theatre|dance|fashion|shoes|jewellery|
small business|marketing|customer complaints|teamwork|remote work|leadership|salaries|taxes|inflation|banks|elections|
democracy|human rights|law courts|copyright|newspapers|social media|advertising|privacy|loneliness|happiness|grief|
rivers|mountains|deserts|weather forecasts|hurricanes|earthquakes|solar panels|wind power|nuclear energy|batteries|
bridges|houses|plumbing|woodwork|sewing|knitting|candles|soap|perfume|tea|chocolate|cheese|wine|salads|soups|breakfast|
camping|fishing|sailing|diving|skiing|surfing|birds|butterflies|spiders|trees|mushrooms|roses|herbs|vegetables|farms|
the Middle Ages|the Renaissance|the Industrial Revolution|World War II|ancient Greece|the Vikings|the Silk Road|
chemistry|acids|metals|magnets|electricity|light|sound|gravity|energy|atoms|the periodic table|evolution|genetics|
bacteria|the brain|memory|dreams|emotions|habits|motivation|procrastination|meditation|religion|mythology|holidays|
sorting algorithms|recursion|regular expressions|spreadsheets|data analysis|statistics|graphs|prime numbers|percentages|
compound interest|unit conversion|calendars|maps|navigation|satellites|telescopes|microscopes|medicine|hospitals|nurses|
letters|emails|resumes|cover letters|reports|meeting notes|presentations|speeches|product reviews|invitations|recipes
"""
_ANGLES = """
|||||for beginners|for children|in daily life|at home|at work|at school|through history|in the future|on a small budget|
in a hurry|and its risks|and its benefits|and common mistakes|and money|and health|and the environment|and technology|
and culture|in old age|in summer|in winter|in a big city|in the countryside|step by step|and myths about it
"""
_PEOPLE = """
a teacher|a student|a nurse|a retired engineer|a shop owner|a young parent|a chef|a traveller|a farmer|a programmer|
a journalist|a beginner|a manager|a musician|a child of ten|a lawyer|a scientist|a gardener|an athlete|a writer
"""
_SYSTEM_TASKS = """
asks a question about {}|asks for a detailed explanation of something about {}|asks for a long story about {}|
asks for a short story about {}|asks for a poem about {}|asks for a list of ideas about {}|asks for advice about {}|
asks for step-by-step instructions about {}|asks for an email about {}|asks for an essay about {}|
asks to compare two things about {}|asks for a summary of a text about {} and gives the text|
asks to rewrite a sentence about {} and gives the sentence|asks to correct a paragraph about {} and gives the paragraph|
asks to translate a sentence about {} and gives the sentence|asks for a dialogue about {}|asks for a plan about {}|
gives a maths word problem about {}|asks for code about {}|asks for a Python function about {}|
asks for the definition of a word about {}|asks to play a role about {}|asks for an argument for and against {}|
asks for a recipe or a how-to about {}|asks to extract facts from a paragraph about {} and gives the paragraph|
asks to classify or sort a few items about {}|asks a riddle or reasoning question about {}|asks why something about {}
is so|asks for a blog post about {}|asks for a product description about {}|asks what to do in a situation about {}
"""
_REQUESTS = """
Write a long story about {}.|Write a short story about {}.|Tell me a story about {} and {}.|Write a poem about {}.|
Explain {} in simple terms.|Explain {} to {p}.|What should I know about {}?|What are the most important facts about {}?|
Give me ten tips about {}.|List five ideas about {}.|List the advantages and disadvantages of {}.|
Write an email to {p} about {}.|Write a letter about {}.|Write a blog post about {}.|Write an essay about {}.|
How does {} work?|Why is {} important?|How do I get started with {}?|How can I learn more about {}?|
Compare {} and {}.|What is the difference between {} and {}?|Describe {} in detail.|Describe the history of {}.|
Write a dialogue between {p} and {p} about {}.|Imagine you are {p}. Talk about {}.|You are {p}. Give advice about {}.|
Write a Python program about {}.|Write a function that has to do with {} and explain it.|
Make a plan about {} for a week.|
Write a speech about {}.|Write a song about {}.|What are common mistakes about {}?|Give an introduction to {}.|
What is the best way to deal with {}?|Write a product description about {}.|Write a quiz about {} with answers.|
Can you help me with {}?|Tell me about {}.|Summarize what is known about {}.|Make a table about {} and {}.|
Write a scene in which {p} discovers {}.|Debate {}: give both sides.|Write a guide about {} for {p}.|
What would happen without {}?|Write three questions about {} and answer them.|Create a checklist about {}.|
Write a maths problem about {} and solve it step by step.|Explain the connection between {} and {}.|
Write a review about {}.|What do experts say about {}?|Give me a recipe or instructions about {}.|
"""


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.replace("\n", "").split("|")]


SUBJECTS = [item for item in _split(_SUBJECTS) if item]
ANGLES = _split(_ANGLES)
PEOPLE = [item for item in _split(_PEOPLE) if item]
SYSTEM_TASKS = [item for item in _split(_SYSTEM_TASKS.replace("\nis so", " is so")) if item]
REQUESTS = [item for item in _split(_REQUESTS) if item]


def draw_topic(random: Random) -> str:
    """Return a subject, often with an angle: "beekeeping on a small budget"."""
    return f"{random.choice(SUBJECTS)} {random.choice(ANGLES)}".strip()


def draw_system_line(random: Random) -> str:
    """Return a line that makes the model write a certain kind of query."""
    if random.random() < 0.35:
        return f"The user asks a question about {draw_topic(random)}."
    return f"The user {random.choice(SYSTEM_TASKS).format(draw_topic(random))}."


def draw_request(random: Random) -> str:
    """Return a ready query put together from a pattern, topics and people."""
    pattern = random.choice(REQUESTS)
    while "{p}" in pattern:
        pattern = pattern.replace("{p}", random.choice(PEOPLE), 1)
    while "{}" in pattern:
        pattern = pattern.replace("{}", draw_topic(random), 1)
    return pattern
