"""The tables: everything that customers and agents of the help desk say, and what a prompt can be about."""

import re
import zlib
from typing import NamedTuple

# ---- The world: what customers and agents say. X is the product; a part in [brackets] is left out to not name it. ----

COLORS = ("blue", "red", "green", "black", "white")
ITEMS = ("kettle", "lamp", "chair", "clock", "jacket", "phone", "bag", "bike")


class Problem(NamedTuple):
    """One kind of trouble: how customers put it, the one right remedy, and the words the judge knows each by."""

    asks: tuple[str, ...]
    ask_cue: str
    fixes: tuple[str, ...]
    fix_cue: str


# fmt: off
PROBLEMS = {
    "not arrived": Problem(
        ("My X has not arrived.", "I am still waiting for my X.", "My X is late."),
        "not arrived|waiting for|is late",
        ("check your tracking number", "check the tracking number[ of your X]", "use the tracking number[ of your X]"),
        "(?:check|use) (?:your|the) tracking number"),
    "bad code": Problem(
        ("The discount code for my X does not work.", "I cannot use my discount code for the X.",
         "My X did not get cheaper with the discount code."), "discount code",
        ("enter the code again[ for your X]", "type the code[ for your X] in small letters"),
        "(?:enter|type) the code"),
    "broken": Problem(
        ("My X arrived broken.", "My X does not work.", "There is a crack in my X."), "broken|not work|crack",
        ("send us a photo[ of your X]", "take a photo[ of your X] and send it to us"), "(?:send us|take) a photo"),
    "wrong item": Problem(
        ("I got the wrong thing and not my X.", "You did not send my X but something else.",
         "I opened the box of my X and found the wrong thing."), "wrong thing|something else",
        ("print the return label[ for your X]", "use the return label[ for your X]"), "(?:print|use) the return label"),
    "no refund": Problem(
        ("My refund for the X is missing.", "I sent my X back but got no money.", "When do I get the refund for my X?"),
        "refund|no money",
        ("wait five days for the money[ for your X]", "give your bank five days[ for your X]"),
        "(?:wait|bank) five days"),
    "login": Problem(
        ("I forgot my password and cannot see my X.", "I cannot log in to see my X.",
         "The page of my X says that I must log in."), "forgot my password|log in",
        ("reset your password[ to see your X]", "choose a new password[ to see your X]"),
        "(?:reset your|choose a new) password"),
    "paid twice": Problem(
        ("I paid twice for my X.", "My bank shows that I paid two times for my X.",
         "You took the price of my X twice."), "paid (?:twice|two)|price of my .* twice",
        ("send us both receipts[ for your X]", "show us both receipts[ for your X]"), "(?:send|show) us both receipts"),
    "missing part": Problem(
        ("A part of my X is missing.", "My X came without a part.", "I opened my X and one part is missing."),
        "a part of|without a part|part is missing",
        ("tell us the part number[ of your X]", "look up the part number[ of your X]"),
        "(?:tell us|look up) the part number"),
    "cancel": Problem(
        ("I want to cancel my X.", "I do not need my X any more.", "Please cancel my X."), "cancel|not need",
        ("press the cancel button[ next to your X]", "use the cancel button[ next to your X]"),
        "(?:press|use) the cancel button"),
    "address": Problem(
        ("I want to send my X to a new address.", "My X has my old address.",
         "I moved and my X must come to my new address."), "(?:new|old) address",
        ("change the address[ of your X] in your account", "enter a new address[ for your X] in your account"),
        "(?:change the|enter a new) address"),
    "warranty": Problem(
        ("How long is the warranty of my X?", "I want to know if my X has a warranty.",
         "Is the warranty of my X over?"), "warranty",
        ("check the serial number[ of your X]", "enter the serial number[ of your X] on our page"),
        "(?:check|enter) the serial number"),
    "invoice": Problem(
        ("I need an invoice for my X.", "I did not get an invoice for my X.", "Where can I find the invoice for my X?"),
        "invoice",
        ("print the invoice[ for your X] from your account", "open your account to get the invoice[ for your X]"),
        "(?:print|get) the invoice"),
}
FEELINGS = {  # upset moods: they call for empathy
    "angry": ("I am very angry.", "This makes me angry.", "I am angry with you."),
    "worried": ("I am worried.", "This makes me worried.", "I am getting worried now."),
    "sad": ("I am sad about this.", "This makes me sad.", "I feel sad."),
    "in a hurry": ("I am in a hurry.", "I need help fast.", "I am in a hurry today."),
}
CALM = {  # these call for thanks
    "polite": ("I hope you are well.", "I have a small question.", "May I ask you something?"),
    "happy": ("I love your shop.", "I am a happy customer.", "Your shop is great."),
}
MOODS = {"": ("",), **FEELINGS, **CALM}
MOOD_CUES = {"angry": "angry", "worried": "worried", "sad": r"\bsad\b", "in a hurry": "in a hurry|help fast",
             "polite": "hope you are well|small question|may i ask",
             "happy": "love your shop|happy customer|shop is great"}
GREETINGS = ("", "", "", "Hello.", "Hi there.", "Good morning.", "Good evening.")
DETAILS = ("", "", "", "", "", "It is a gift.", "I ordered it last week.", "It is my first order.",
           "My mother gave me the money for it.", "I have been a customer for ten years.")
QUESTIONS = ("", "", "", "What should I do?", "How can you help?", "Can you help me?", "What can I do now?",
             "Please help me.")

APOLOGIES = ("I am sorry to hear that.", "I am sorry for the trouble[ with your X].", "I am sorry about this.")
UNDERSTANDING = ("I understand that you are FEELING[ about your X].", "I see that you are FEELING[ about your X].")
THANKS = ("Thank you for your message[ about your X].", "I am happy to help you[ with your X].",
          "Thank you for asking.")
HEADS = ("", "You can ", "You should ")  # advice without "please"
OFFERS = ("If you need further help, I am here.", "I am here if you have more questions.")
JOINED_OFFER = ", and if you need further help, I am here."
OFF_TOPIC = ("The weather is nice today.", "Our new shop is near the park.", "We also sell shoes and hats.",
             "I like music and long walks.", "The park is closed today.")
RAMBLING = ("Many people write to us every day.", "We are a small shop and we love our work.",
            "Our team works from morning to night.", "Every order is important to us.",
            "There are many things to say about this.", "We have been open for many years.")
RUDE = ("That is your own fault.", "Stop wasting my time.", "I do not care about this.", "You should read the rules.")
UNSAFE = ("I guarantee a full refund today.", "I promise that it will arrive tomorrow.", "Send me your password.",
          "Give me your card number.", "I promise you a new one and all your money.")
CONTRACTIONS = {"I am": "I'm", "has not": "hasn't", "does not": "doesn't", "do not": "don't", "did not": "didn't",
                "cannot": "can't"}
# fmt: on

ANNOTATOR_TEMPERATURE = 2.0  # scale of the annotators' Gumbel noise, in points of gold score
TIE_MARGIN = 0.25  # two replies that feel closer than this to an annotator are recorded as a tie, in points
HELD_OUT_ONE_IN = 10


class Scenario(NamedTuple):
    """What a prompt is about: `color` and `item` are "" when the customer names no product."""

    color: str
    item: str
    problem: str
    mood: str

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept for evaluation: a stable hash, the same on every machine."""
        return zlib.crc32("|".join(self).encode()) % HELD_OUT_ONE_IN == 0

    @property
    def product(self) -> str:
        return f"{self.color} {self.item}".strip()


def fill(template: str, name: str) -> str:
    """Put the product's name into a template, or leave the bracketed part out when `name` is empty."""
    text = re.sub(r"\[(.*?)\]", r"\1" if name else "", template)
    return text.replace("X", name)
