"""The world's words: what can be drawn and said, in English and Chinese."""

from __future__ import annotations

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("small", "large")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
BACKGROUNDS = ("night", "fog", "snow", "desert")
FRAMES = ("gold", "silver")
SIGN_WORDS = (
    "bank",
    "book",
    "cafe",
    "cake",
    "fish",
    "lamp",
    "milk",
    "park",
    "rice",
    "ship",
    "shoe",
    "taxi",
)
# A shape's given name and an arrangement's name: knowledge that no single picture shows.
NAMES = {
    "circle": "Otto",
    "square": "Boris",
    "triangle": "Tina",
    "diamond": "Dina",
    "cross": "Max",
    "ring": "Rosa",
}
LANDMARKS = ("Tower", "Wall", "Stairs")
TRAITS = ("warm", "cold", "heavy", "light", "hard", "soft", "sweet", "sour")

CHINESE = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "diamond": "菱形",
    "cross": "十字",
    "ring": "圆环",
    "small": "小",
    "large": "大",
    "top left": "左上",
    "top": "上面",
    "top right": "右上",
    "left": "左面",
    "middle": "中间",
    "right": "右面",
    "bottom left": "左下",
    "bottom": "下面",
    "bottom right": "右下",
    "night": "夜晚",
    "fog": "雾",
    "snow": "雪",
    "desert": "沙漠",
    "yes": "是",
    "no": "否",
}
# Other Chinese words of the questions: with CHINESE, what the tokenizer splits text by.
CHINESE_PARTICLES = ("图中", "有几个", "图形", "什么", "颜色", "哪个", "在", "哪里", "的", "写着",
                     "数字", "单词", "场景", "这是", "大小", "是")  # fmt: skip


def chinese(word: str) -> str:
    """Return the Chinese of a word; numbers and words on signs stay as they are."""
    return CHINESE.get(word, word)
