"""Tasks: what the hypernetwork is trained on and judged by.

A task is a name, descriptions of it in words, and examples (input, right answers). They come from a folder of
JSON files (Natural Instructions' format) or from the built-in tiny world, which is made up below: 512 tasks on
lists of four everyday words, such as "keep the animals, translate them into French, reverse the order".
"""

import json
import random
import zlib
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from lora import UserError, read_json

Example = tuple[str, list[str]]  # input, right answers; the first of them is the one to learn


@dataclass
class Task:
    """One task. `reworded` are descriptions in wordings that no training description uses (tiny world only)."""

    name: str
    descriptions: list[str]
    train: list[Example]
    test: list[Example]
    reworded: list[str] = field(default_factory=list)


def load_tasks(source: str) -> dict[str, list[Task]]:
    """{"train": [...], "val": [...], "test": [...]} of the tiny world ("tiny") or of a folder of task files."""
    return tiny_tasks() if source == "tiny" else folder_tasks(source)


def pick(tasks: dict[str, list[Task]], split: str, n_tasks: int | None = None) -> list[Task]:
    """The first n tasks of a split in one fixed shuffled order, so that fewer tasks are a subset of more."""
    if not tasks.get(split):
        raise UserError(f"these tasks have no split {split}; they have {', '.join(k for k, v in tasks.items() if v)}")
    chosen = list(tasks[split])
    random.Random(0).shuffle(chosen)
    if n_tasks is not None and not 1 <= n_tasks <= len(chosen):
        raise UserError(f"--n_tasks {n_tasks}: the {split} split has 1 to {len(chosen)} tasks")
    return chosen[:n_tasks]


# ---------------------------------------------------------------------------------------------------------
# A folder of task files
# ---------------------------------------------------------------------------------------------------------


def folder_tasks(folder: str | Path) -> dict[str, list[Task]]:
    """Read NAME.json files, split as splits.json says; without it all are training tasks."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--tasks {folder}: neither tiny nor a folder of task files")
    files = sorted(p for p in folder.glob("*.json") if p.name != "splits.json")
    if not files:
        raise UserError(f"--tasks {folder}: no task files (NAME.json) in it")
    splits = read_json(folder / "splits.json") if (folder / "splits.json").exists() else {"train": [p.stem for p in files]}
    return {split: [read_task(folder / f"{name}.json") for name in splits.get(split, [])] for split in ("train", "val", "test")}


def read_task(path: Path) -> Task:
    """One file: {"name", "descriptions" or "Definition", "Instances": [{"input", "output": [...]}]}. The last fifth
    of the instances is the test part."""
    content = read_json(path)
    try:
        descriptions = content.get("descriptions") or content["Definition"]
        examples = [(x["input"].strip(), [o.strip() for o in x["output"]]) for x in content["Instances"]]
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a task file: {e} is missing or of the wrong kind") from None
    n_train = len(examples) - len(examples) // 5
    descriptions = [descriptions] if isinstance(descriptions, str) else descriptions
    return Task(content.get("name", path.stem), descriptions, examples[:n_train], examples[n_train:])


# ---------------------------------------------------------------------------------------------------------
# The tiny world: its words
# ---------------------------------------------------------------------------------------------------------

# English, plural, French, Spanish, German, Italian
WORDS = """
animals   cat cats chat gato Katze gatto; dog dogs chien perro Hund cane; horse horses cheval caballo Pferd cavallo;
          cow cows vache vaca Kuh mucca; bird birds oiseau pájaro Vogel uccello; mouse mice souris ratón Maus topo;
          wolf wolves loup lobo Wolf lupo; bear bears ours oso Bär orso
fruits    apple apples pomme manzana Apfel mela; cherry cherries cerise cereza Kirsche ciliegia;
          strawberry strawberries fraise fresa Erdbeere fragola; peach peaches pêche melocotón Pfirsich pesca;
          lemon lemons citron limón Zitrone limone; plum plums prune ciruela Pflaume prugna; fig figs figue higo Feige fico;
          raspberry raspberries framboise frambuesa Himbeere lampone
colours   red reds rouge rojo rot rosso; blue blues bleu azul blau blu; yellow yellows jaune amarillo gelb giallo;
          black blacks noir negro schwarz nero; white whites blanc blanco weiß bianco; brown browns marron marrón braun marrone;
          purple purples violet morado lila viola; silver silvers argenté plateado silbern argentato
clothes   shirt shirts chemise camisa Hemd camicia; hat hats chapeau sombrero Hut cappello; shoe shoes chaussure zapato Schuh scarpa;
          dress dresses robe vestido Kleid vestito; coat coats manteau abrigo Mantel cappotto; skirt skirts jupe falda Rock gonna;
          glove gloves gant guante Handschuh guanto; belt belts ceinture cinturón Gürtel cintura
body      head heads tête cabeza Kopf testa; foot feet pied pie Fuß piede; eye eyes œil ojo Auge occhio; ear ears oreille oreja Ohr orecchio;
          nose noses nez nariz Nase naso; mouth mouths bouche boca Mund bocca; tooth teeth dent diente Zahn dente;
          knee knees genou rodilla Knie ginocchio
house     chair chairs chaise silla Stuhl sedia; bed beds lit cama Bett letto; spoon spoons cuillère cuchara Löffel cucchiaio;
          knife knives couteau cuchillo Messer coltello; lamp lamps lampe lámpara Leuchte lampada; door doors porte puerta Tür porta;
          key keys clé llave Schlüssel chiave; mirror mirrors miroir espejo Spiegel specchio
nature    tree trees arbre árbol Baum albero; flower flowers fleur flor Blume fiore; river rivers rivière río Fluss fiume;
          mountain mountains montagne montaña Berg montagna; star stars étoile estrella Stern stella; sun suns soleil sol Sonne sole;
          cloud clouds nuage nube Wolke nuvola; stone stones pierre piedra Stein pietra
"""
CATEGORIES: dict[str, list[str]] = {}
FORMS: dict[str, dict[str, str]] = {}  # {"cat": {"plural": "cats", "french": "chat", ...}}
MAPS = ("same", "plural", "french", "spanish", "german", "italian", "capitals", "initial")
for line in WORDS.replace(";\n ", "; ").strip().split("\n"):
    category, entries = line.split(maxsplit=1)
    entries = [entry.split() for entry in entries.split(";")]
    CATEGORIES[category] = [entry[0] for entry in entries]
    FORMS |= {e[0]: dict(zip(MAPS, (*e, e[0].upper(), e[0][0]))) for e in entries}
FILTERS = ("all", *CATEGORIES)
LAYOUTS = {
    "in_order": lambda words: words,
    "reversed": lambda words: words[::-1],
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
    "exclaimed": lambda words: [*words, "!"],
    "joined": lambda words: " and ".join(words).split(),
    "numbered": lambda words: [x for i, word in enumerate(words, 1) for x in (f"{i}.", word)],
    "counted": lambda words: [*words, f"({len(words)})"],
}
VOCABULARY = [
    "<pad>", "<eos>", "<unk>", "->", "!", "and", "1.", "2.", "3.", "4.", "(1)", "(2)", "(3)", "(4)",
    *dict.fromkeys(form for forms in FORMS.values() for form in forms.values()),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------
# The tiny world: its sentences
# ---------------------------------------------------------------------------------------------------------

# Ways to say each part of a task, as an instruction and (after --) as a phrase inside a sentence. What stands after
# || is never used in training descriptions: it makes the reworded ones.
SAY_FILTER = """
all      take all the words | use every word | keep the whole list | work with everything in the list | leave nothing out |
         take each word you are given | keep all four words | go through every item | do not drop any word | use the full list |
         consider all the items | include every entry | do it for each of the words | treat every word in the list |
         keep everything | use all of them |
         cover the complete list | take the list as a whole | none of the words may be missing | handle every single word | apply this to each item you see || make use of every one of the words | skip nothing | handle the entire list
      -- all the words | every word | the whole list | each of the words | everything in the list | all items | the full list |
         the words | all four words | all of them | the words of the list | every item |
         every single one | the complete list | each item | whatever is in the list | the four words | all of it || each and every word | the entire list
category keep only the {c} | pick out the {c} | ignore everything except the {c} | select the {c} | use just the {c} |
         drop whatever is not one of the {c} | find the {c} | look for the {c} | throw away all words but the {c} | take the {c} |
         discard the words that are not {c} | extract the {c} | filter the list down to the {c} | restrict yourself to the {c} |
         leave out anything that isn't among the {c} | remove every word except {c} | keep {c} and nothing else | search for {c} |
         choose the words that are {c} | only use {c} |
         pull out the {c} | drop the rest and keep the {c} | forget all words other than the {c} | spot the {c} | of all the words, take the {c} | pay attention to {c} only | only the {c} count | strip out everything apart from the {c} || concentrate on the {c} | get rid of all that is not {c} |
         work solely with the {c} | skip the words that don't name {c}
      -- the {c} | only the {c} | just the {c} | all the {c} | the {c} in the list | nothing but the {c} | any {c} you see |
         the words for {c} | every one of the {c} | {c} only | the {c} alone | the words that are {c} | the {c} among the words |
         those that are {c} |
         any {c} | whatever {c} there are | every word that is one of the {c} | {c} | {c} from the list | the {c} given | each of the {c} | words that mean {c} || whichever words are {c} | solely the {c} | the {c} you find | the {c} from the input
"""
SAY_MAP = """
same     leave the words unchanged | copy them as they are | do not alter the words | keep the spelling as it is | repeat them exactly |
         write them as given | copy the words | change nothing about the words | keep each word as it is | just repeat them |
         do not translate or change them | leave every word alone | write them out unaltered | use the words themselves |
         reproduce them word for word |
         write the words exactly the way they came | let the words stay the same | give the words back untouched | print the words as they stand | no translation, no changes | don't touch the words themselves || simply echo them | make no change to any word | don't modify them
      -- unchanged | as they are | exactly as written | without changing them | in their original form | untouched | in English |
         just copied | word for word | as given | unaltered | simply repeated | the way they are written |
         in the form given | the same as in the input | not changed at all | exactly the same | as they stand | kept as they were | in their given form || verbatim | with no change to the words | left as is
plural   put them in the plural | make each one plural | turn every word into its plural | pluralise them | pluralize each word |
         write the plural of each | give the plural forms | use the plural form | change singular to plural |
         write them as if there were many of each | turn one into many | form the plurals | convert them to plural | use plurals |
         speak of several of each |
         make more than one of each | add the plural ending | name more than one of each | go from singular to plural | turn cat into cats and so on | use the form for many || rewrite every noun in the plural | make them plurals | give each word its plural ending
      -- in the plural | in plural form | made plural | as plurals | pluralised | pluralized | with each word in the plural |
         turned into plurals | changed to the plural | in their plural form | as plural words | with plural endings |
         as if there were several of each |
         in their plurals | in the form for more than one | as more than one | plural | for more than one of each | in the many form || put into the plural | converted to plural form | each as a plural
language translate them into {l} | say them in {l} | write them in {l} | give the {l} word for each | put them into {l} | turn them into {l} |
         use {l} words for them | switch the language to {l} | express each in {l} | name them in {l} | translate each word to {l} |
         convert each to {l} | replace each with its {l} translation | give the {l} translation | answer in {l} |
         write the {l} for each word | change the language from English to {l} | say what they are called in {l} |
         give their {l} names |
         name them the {l} way | put each in {l} | find the {l} words for them | tell how a {l} speaker says them | I want to hear them in {l} | swap English for {l} | use {l} | it should be in {l} || speak {l} when you name them | render every word in {l} | swap each word for its {l} equivalent | tell me the {l} for them
      -- in {l} | translated into {l} | in the {l} language | as {l} words | put into {l} | written in {l} | translated to {l} |
         with their {l} names | by their {l} names | said in {l} | turned into {l} | as one says it in {l} | in {l} translation |
         with each word in {l} | using {l} words |
         the {l} way | into {l} | the {l} for them | the {l} translations | {l} version | as {l} speakers say them | from English to {l} | their {l} translation | in the {l} form || rendered in {l} | as a speaker of {l} would say | replaced by the {l} words
capitals write them in capital letters | use capitals | put everything in upper case | uppercase each word | capitalise every letter |
         set them in block capitals | make all letters big | use only capital letters | write in all caps | turn on caps lock |
         convert them to uppercase | change every letter to a capital | capitalize all letters | shout them in capitals |
         use upper-case letters |
         make every letter upper case | write everything large, in capitals | change the small letters to capitals | print them in capitals | capitalize the whole words | go all caps | turn lower case into upper case | write the words fully in uppercase || type the words with caps lock on | spell each word in big capital letters | make them uppercase
      -- in capitals | in capital letters | in upper case | uppercased | in all caps | in block capitals | in big letters | in uppercase |
         with every letter capitalised | written in capitals | all caps | with capital letters only | as capitals | shouted in capitals |
         entirely in capitals | fully capitalised | in upper-case | in large letters | in capital form | completely in upper case | with caps lock | all in capital letters ||
         in upper-case letters | set in caps | completely capitalised
initial  give just the first letter of each | write only initials | shorten each to its first letter | abbreviate every word to one letter |
         keep only the opening letter of each word | reduce them to initials | write the initial of each | cut each word down to its first letter |
         replace each word by its initial | use one letter for each word | take the first letter of each word | turn them into initials |
         write just the starting letter of every word | spell only the first letter | abbreviate them to their initials |
         only the first letter of each word is wanted | write one letter per word, the first | strip each word to its opening letter | leave only the first letter of every word | say which letter each begins with | shrink every word to its first character | just use the beginning letter of each ||
         let a single letter stand for each word | give the initials | drop all but the first letter of each word
      -- as initials | abbreviated to the first letter | by first letter only | shortened to their initials | reduced to one letter each |
         as single letters | with only the first letter of each word | cut to the first letter | abbreviated to one letter |
         by their initials | each as its first letter | as starting letters | initials only |
         first letters | just the first letters | one letter per word | by the letter they begin with | just the opening letter of each | first characters | the first letter of each word only | as one-letter abbreviations || as their initial letters |
         abbreviated to initials | each shortened to a single letter
"""
SAY_LAYOUT = """
in_order  keep the order | do not change the order | list them in the order given | preserve the original order | write them one after another |
          leave the order alone | go from first to last | follow the order of the list | put them in the same order | stay in order |
          answer in the order you read them | start with the first and end with the last | keep them in sequence | do not rearrange them |
          list them simply one by one |
          leave the sequence as it is | retain the order they appear in | do not mix them up | same order as the input | write them from start to finish | let the order stay | put them down as they appear | nothing fancy, simply list them | keep them arranged as they were | follow the sequence of the input || maintain the sequence | don't shuffle them | stick to the given order
       -- in the given order | in the same order | in their original order | in order | one after another | from first to last | in sequence |
          in the order of the list | without reordering | as a plain list | one by one | keeping the order | in unchanged order |
          in the order they appear | as they appear in the list | in the sequence given | with the order kept | from start to finish | in the order of appearance | listed plainly | same order as before | simply listed | in the existing order ||
          in the order they came | with the sequence kept | in list order
reversed  reverse the order | write them backwards | go from last to first | start from the end | put the last one first | list them in reverse |
          flip the order | turn the list around | read the list from the back | use the opposite order | invert the sequence |
          reverse the list | begin with the last and end with the first | order them from the end to the start | list them back to front |
          reverse them | turn them around | go backwards | swap the order around | begin at the back | read from right to left | walk through the list from the end | put them the other way round | count down from the last to the first | list the last one first and the first one last | order them the other way | make the sequence run backwards ||
          turn the order upside down | work backwards through the list | arrange them in reversed sequence
       -- in reverse order | backwards | in reverse | from last to first | starting from the end | with the last one first | reversed |
          in the opposite order | back to front | with the order flipped | in inverted order | from the end to the beginning |
          in reversed order |
          the other way round | in backward order | beginning with the last | in the reversed sequence | from right to left | ordered from the last to the first | turned around | from the back to the front | from end to start | last one first | starting with the final one | flipped around | running backwards || from the back | with the sequence reversed | last to first
first     give only the first one | stop after the first | answer with the first one alone | keep just the first | write only the one that comes first |
          name the first one only | ignore all after the first | take the first of them | output nothing but the first | pick the first one |
          return the very first | show only the first | limit yourself to the first one | the first one is enough | drop all but the first |
          only the first matters | just say the first one | give the one that is first in the list | let the first be your whole answer | find the first and forget the rest | leave out everything but the first | print a single one, the first | the earliest in the list is all I want | quit once you have the first | choose the one at the front ||
          say the one at the beginning and stop | only tell me the first one | leave off everything following the first
       -- only the first one | but just the first | the first one alone | the first only | nothing after the first | taking only the first |
          just the one that comes first | limited to the first | the very first one | and only the first of them | first one only |
          stopping after the first | but no more than the first |
          the first of them | whichever comes first | the one that appears first | just the earliest | the one in front only | a single one: the first | only the one at the beginning | first in the list | only the initial one of the list | the leading one | nothing else than the first || solely the first one | the one at the start only | just the first one of them
last      give only the last one | skip to the last | answer with the last one alone | keep just the last | write only the one that comes last |
          name the last one only | ignore all before the last | take the last of them | output nothing but the last | pick the last one |
          return the very last | show only the final one | limit yourself to the last one | the last one is enough | drop all but the last |
          only the last matters | just say the last one | give the one that is last in the list | let the last be your whole answer | find the last and forget the rest | leave out everything but the last | print a single one, the last | the final one is all I want | choose the one at the back | go straight to the final one ||
          say the one at the end and nothing else | only tell me the last one | leave off everything preceding the last
       -- only the last one | but just the last | the last one alone | the last only | nothing before the last | taking only the last |
          just the one that comes last | limited to the last | the very last one | and only the last of them | last one only |
          the final one only | but no more than the last |
          the last of them | whichever comes last | the one that appears last | just the final one | the one at the back only | a single one: the last | only the one at the end | last in the list | only the closing one of the list | the final item | nothing else than the last || solely the last one | the one at the end only | just the final one of them
exclaimed end with an exclamation mark | add an exclamation mark at the end | finish with ! | close with an exclamation point |
          put ! after the last word | append an exclamation mark | place an exclamation mark behind them | finish the answer with an exclamation mark |
          add ! to the end | sound excited with a final ! | conclude with an exclamation mark | write ! at the very end |
          let an exclamation point follow | make it an exclamation | put an exclamation mark at the end of the list |
          with ! as the last character | say it with an exclamation mark | let the list finish in ! | an exclamation mark goes at the end | tack a ! on | make the end an exclamation mark | follow up with an exclamation mark | show excitement with an exclamation mark | put one exclamation mark after everything ||
          top it off with an exclamation mark | the answer must end in ! | exclaim it
       -- with an exclamation mark at the end | ending in an exclamation mark | followed by ! | with a final exclamation mark |
          with ! at the end | closed by an exclamation point | plus an exclamation mark | then an exclamation mark | and a ! after them |
          as an exclamation | with an exclamation point | finished with an exclamation mark | ending with ! |
          with an exclamation mark | ! at the end | an exclamation mark after the last | rounded off by an exclamation mark | with an exclamation mark tacked on | with an exclamation mark as the last thing | and then ! | with one ! to close | with excitement, that is with ! ||
          and an exclamation mark to finish | with a closing ! | exclaimed
joined    join them with and | put and between them | link them with the word and | connect the words using and | separate them by and |
          insert the word and between them | write and between every two | string them together with and | use and to join them |
          place "and" between neighbours | combine them with "and" | put the word and in between | have and connect them | chain them by and |
          say and between one and the next |
          write and between the words | place and between each pair | an and goes between every two of them | make one phrase with and between the words | say and each time before the next | hook them up with the word and | the word and should stand between them | combine everything using and | put and after each except the last || glue them together with and | let "and" separate them | add and after each but the last
       -- joined with and | with and between them | linked by and | connected by the word and | separated by and | with "and" in between |
          joined by "and" | strung together with and | with the word and between each two | chained with and | combined by and |
          with and as the separator | put together using and |
          with the word and between them | one and another joined by and | with and in the middle | and in between | hooked together by and | as this and that and so on | with and before each further one | using and as the glue | all joined with and | connected with and || glued by the word and | and-separated | with an and in each gap
numbered  number them | put a number before each | make it a numbered list | write 1. 2. 3. in front of them | number the items from one on |
          enumerate them | give each a number | count them off with numbers in front | add list numbers | place 1., 2. and so on before the words |
          number each one | write their position number before them | start each with its number | produce a numbered list | label them 1., 2., 3. |
          number the words | use numbers 1, 2, 3 for them | put 1. before the first, 2. before the second and so on | write the list with numbers | every item gets its number in front | begin every entry with its number | set it out as a numbered list | assign numbers in order | list them as 1, 2, 3 | stick a number in front of each ||
          prefix every one with its number | turn it into an enumeration | have a running number precede each
       -- as a numbered list | numbered | with a number before each | with numbers | enumerated | each with its number | numbered from one |
          with 1., 2., 3. in front | in a numbered list | as an enumeration | with list numbers | labelled with numbers |
          each preceded by its number |
          numbered 1, 2, 3 | with numbers in front | in numbered form | as numbered items | each with a number in front | as 1., 2., 3. and so on | as items with numbers | listed by number | with a number at the start of each | numbering each || with running numbers | numbered one by one | prefixed by numbers
counted   say how many there are at the end | add the count in brackets | end with the total in parentheses | put their number in brackets at the end |
          append how many there are | count them and write the count last | finish with the count | state the total after them |
          write the number of words in brackets | add the total number at the end | close with how many they are | give the count afterwards |
          count them at the end | add a tally at the end | tell their total in parentheses |
          count them | write how many you found at the end | give the number of them in brackets | put the total in brackets at the end | let me know how many there are | at the end say the number of words | tell how many there are in brackets | finish with their number | the count goes last, in parentheses | follow the list with how many there are || conclude with how many words that is |
          tack on the total | write in brackets how many you listed
       -- with the count at the end | followed by the total in brackets | with their number in parentheses | and how many there are |
          plus the count | ending with how many there are | with the total at the end | and the count in brackets | with a final count |
          with how many they are in brackets | and then the total | followed by their count | with the tally at the end |
          with the number of words at the end | then the count in brackets | then how many there were | ending in the count | and their number | with the number in brackets after them | plus their total | with how many were found | and the total number | along with the count in parentheses ||
          with the total added in parentheses | and the number of them last | counted at the end
"""
NAMES = {  # what a category or a language is called
    "animals": "animals | creatures | animal words | beasts | animal names | kinds of animal | living creatures",
    "fruits": "fruits | fruit | kinds of fruit | fruit names | fruit words | pieces of fruit | things that grow as fruit",
    "colours": "colours | colors | colour words | color words | names of colours | shades | hues",
    "clothes": "clothes | garments | items of clothing | clothing | things to wear | pieces of clothing | clothing words",
    "body": "body parts | parts of the body | parts of a body | anatomy words | bodily parts | words for the human body",
    "house": "household things | household objects | things in the house | household items | things found at home | objects from the home | furnishings and tools",
    "nature": "nature words | things from nature | natural things | things found outdoors | things in the landscape | outdoor words | elements of nature",
    "french": "French", "spanish": "Spanish", "german": "German", "italian": "Italian",
}  # fmt: skip
# Sentence frames: start, order of filter, map and layout, what goes between them, before the last, and after it.
INSTRUCT = [  # of instructions
    ("", "fml", ", ", " and ", "."), ("", "fml", ". Then ", ". Finally ", "."), ("First ", "fml", ", then ", ", then ", "."),
    ("", "fml", "; ", "; ", "."), ("Please ", "fml", ", ", ", and ", "."), ("Your task: ", "fml", "; ", "; ", "."),
    ("You get a list of words: ", "fml", ", ", " and ", "."), ("I want you to ", "fml", ", to ", " and to ", "."),
    ("In this task you ", "fml", ", ", ", and ", "."), ("From the words given, ", "fml", ", ", " and ", "."),
    ("", "mfl", " after you ", ", and ", "."), ("", "lfm", ", but first ", " and ", "."), ("Given some words, ", "fml", ". ", ". ", "."),
    ("", "fml", ", and ", ". Also ", "."), ("When you read the list, ", "fml", ", ", ", and ", "."), ("You should ", "fml", ", ", " and ", "."),
    ("", "flm", " and ", ", and ", "."), ("Step one: ", "fml", ". Next: ", ". Next: ", "."), ("", "fml", " - ", " - ", ""),
    ("", "mlf", ", ", ", but only after you ", "."),
    # withheld
    ("What you have to do is ", "fml", ", ", " and ", "."), ("Could you ", "fml", ", ", " and ", "?"), ("The job is to ", "fml", ", ", ", and ", "!"),
]  # fmt: skip
PHRASE = [  # of phrases
    ("", "fml", " ", ", ", "."), ("Write ", "fml", " ", ", ", "."), ("Give me ", "fml", " ", ", ", "."), ("List ", "flm", ", ", ", ", "."),
    ("Output ", "fml", ", ", ", ", "."), ("The answer is ", "fml", " ", ", ", "."), ("Return ", "flm", ", ", " and ", "."),
    ("What are ", "fml", " ", ", ", "?"), ("Show ", "fml", " ", " and ", "."), ("I need ", "fml", ", ", ", ", "."), ("Answer with ", "fml", " ", ", ", "."),
    ("Your answer contains ", "fml", ", ", ", ", "."), ("Copy out ", "fml", " ", ", ", "."), ("Say ", "fml", " ", ", ", "!"),
    ("", "fml", ", ", ", ", ""), ("From the list give ", "fml", " ", ", ", "."), ("Print ", "flm", " ", ", ", "."), ("Please write down ", "fml", " ", ", ", "."),
    # withheld
    ("Tell me ", "fml", " ", ", ", "."), ("We would like ", "fml", ", ", ", ", "."), ("The output should be ", "fml", " ", ", ", "."),
]  # fmt: skip
WITHHELD_FRAMES = 3
DEFAULTS = {"all", "same", "in_order"}  # parts that a sentence may leave unsaid


def read_phrases(table: str) -> dict[str, list[tuple[list[str], list[str]]]]:
    """{part: [(seen, withheld) instructions, (seen, withheld) phrases]}"""
    said, name = {}, None
    for line in table.strip().split("\n"):
        head, rest = (line.split(maxsplit=1)) if not line.startswith(" ") else ("", line)
        name = head or name
        said[name] = f"{said.get(name, '')} {rest.strip()}"
    split = lambda text: [phrase.strip() for phrase in text.split("|")]
    return {part: [tuple(map(split, style.split("||"))) for style in text.split(" -- ")] for part, text in said.items()}


SAY = read_phrases(SAY_FILTER) | read_phrases(SAY_MAP) | read_phrases(SAY_LAYOUT)


def describe(parts: tuple[str, str, str], rng: random.Random, reworded: bool = False) -> str:
    """One sentence that says what a tiny task is; `reworded` makes it of withheld phrases and frames only."""
    style = rng.random() < 0.5  # False: instructions, True: phrases
    frames = PHRASE if style else INSTRUCT
    start, order, between, last, end = rng.choice(frames[-WITHHELD_FRAMES:] if reworded else frames[:-WITHHELD_FRAMES])
    said = {}
    for kind, part in zip("fml", parts):
        general = part if part in SAY else "category" if part in CATEGORIES else "language"
        said[kind] = rng.choice(SAY[general][style][reworded])
        if part in NAMES:
            said[kind] = said[kind].format(c=rng.choice(NAMES[part].split(" | ")), l=NAMES[part])
    unsaid = [kind for kind, part in zip("fml", parts) if part in DEFAULTS and not (style and kind == "f")]
    rng.shuffle(unsaid)
    for kind in unsaid[: len(said) - 1]:
        if rng.random() < 0.4:
            del said[kind]
    words = [said[kind] for kind in order if kind in said]
    text = start + between.join(words[:-1]) + (last if words[:-1] else "") + words[-1] + end
    return text[0].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------------
# The tiny world: its tasks
# ---------------------------------------------------------------------------------------------------------


def tiny_example(parts: tuple[str, str, str], rng: random.Random, n_words: int = 4) -> Example:
    """A list of words and the right answer, drawn such that neighbouring tasks answer differently.

    With a category as filter, two or three of four words belong to it, and the first of the list does not where
    the task wants the first, nor the last where it wants the last.
    """
    chosen, change, layout = parts
    if chosen == "all":
        kept = words = rng.sample(list(FORMS), n_words)
    else:
        n_kept = rng.randint(max(1, n_words - 2), min(3, n_words))
        kept = rng.sample(CATEGORIES[chosen], n_kept)
        others = rng.sample([w for w in FORMS if w not in CATEGORIES[chosen]], n_words - n_kept)
        words = kept + others
        rng.shuffle(words)
        end = {"first": 0, "last": -1}.get(layout)
        if end is not None and words[end] in kept and others:
            i = words.index(others[0])
            words[i], words[end] = words[end], words[i]
        kept = [w for w in words if w in kept]
    return " ".join(words), [" ".join(LAYOUTS[layout]([FORMS[w][change] for w in kept]))]


def tiny_inputs(description: str, n: int = 3) -> list[str]:
    """Inputs to show an adapter on, with words of the category that the description names, if it names one."""
    named = [c for c in CATEGORIES if any(name in description.lower() for name in (c, *NAMES[c].split(" | ")))]
    rng = random.Random(0)
    return [tiny_example((named[0] if named else "all", "same", "in_order"), rng)[0] for _ in range(n)]


def tiny_splits() -> dict[str, list[tuple[str, str, str]]]:
    """The 512 tasks as (filter, map, layout): 479 to train on, 8 to validate, 25 to test."""
    parts = list(product(FILTERS, MAPS, LAYOUTS))
    random.Random(2506_06105).shuffle(parts)
    return {"test": parts[:25], "val": parts[25:33], "train": parts[33:]}


def tiny_task(parts: tuple[str, str, str], n_train: int = 100, n_test: int = 25, n_descriptions: int = 128) -> Task:
    """The task as data: 128 descriptions like the paper's, examples that are the same every time."""
    rng = random.Random("-".join(parts))
    examples = [tiny_example(parts, rng) for _ in range(n_train + n_test)]
    return Task(
        name="-".join(parts),
        descriptions=[describe(parts, rng) for _ in range(n_descriptions)],
        train=examples[:n_train],
        test=examples[n_train:],
        reworded=[describe(parts, rng, reworded=True) for _ in range(n_descriptions // 4)],
    )


def tiny_tasks() -> dict[str, list[Task]]:
    """All tasks of the tiny world by split."""
    return {split: [tiny_task(parts) for parts in tasks] for split, tasks in tiny_splits().items()}
