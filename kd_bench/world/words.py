"""The world's words: what can be drawn and said, in English and Chinese."""

from __future__ import annotations

COLOURS = ("red", "yellow", "green", "blue")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("night", "sea", "forest", "soil")
FRAMES = ("gold", "silver")
SIGN_WORDS = ("bank", "cake", "fish", "milk", "shoe", "taxi")
# A shape's given name and an arrangement's name: knowledge that no single picture shows.
NAMES = {"circle": "Otto", "square": "Boris", "triangle": "Tina", "cross": "Max"}
LANDMARKS = ("Tower", "Wall", "Stairs")
# What shapes of a colour are like: the world's science.
TRAITS = {"red": "warm", "yellow": "sweet", "green": "soft", "blue": "heavy"}

CHINESE = {
    "red": "红色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "cross": "十字",
    "small": "小",
    "large": "大",
    "top left": "左上",
    "top right": "右上",
    "bottom left": "左下",
    "bottom right": "右下",
    "night": "夜晚",
    "sea": "大海",
    "forest": "森林",
    "soil": "泥土",
    "yes": "是",
    "no": "否",
}
# Other Chinese words of the questions: with CHINESE, what the tokenizer splits text by.
CHINESE_PARTICLES = ("图中", "有几个", "图形", "什么", "颜色", "哪个", "在", "哪里", "的", "写着",
                     "数字", "单词", "场景", "这是", "大小", "有")  # fmt: skip


def chinese(word: str) -> str:
    """Return the Chinese of a word; numbers and words on signs stay as they are."""
    return CHINESE.get(word, word)


# Every English word of pictures, questions and answers beside the places: with CHINESE, digits,
# option letters and the benchmarks' fixed lines, what the tokenizer knows.
_ENGLISH = """
Are Boris Can Context Describe Does How Is It List Max Otto Stairs Tina Tower Wall What Where
Which a above and are artwork at bank below blue cake called circle circles color cross crosses
digit digits first fish forest four frame gold green heavy image in is large last left many milk
night no number of on one photo picture poster red right roll same scene sea second shape shapes
shoe show shows sign silver size small soft soil square squares sum sweet taxi the there third
this three to triangle triangles two unanswerable warm word yellow yes
"""
ENGLISH = tuple(_ENGLISH.split())
