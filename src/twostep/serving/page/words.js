// The page's own words in English and Chinese, and prompts to begin with.

const WORDS = {
  en: {
    about: "Pictures in two steps: the first shows where it goes, the second sharpens it.",
    toy: "This is the embedded toy: a small model that draws emoji-like scenes at 64 pixels. It shows how the server works, not how good two steps are.",
    theme: "Light / dark",
    prompt: "Prompt",
    mode: "Make",
    one: "Pictures",
    pair: (p) => `${p.fast} against ${p.slow} steps`,
    model: "Model",
    presets: "Presets",
    size: "Size",
    width: "width in pixels",
    height: "height in pixels",
    seed: "Seed",
    dice: "another seed",
    fresh: "new each time",
    count: "Count",
    key: "API key",
    go: "Make",
    cancel: "Cancel",
    empty: "Nothing made yet. Choose an example, or write a prompt.",
    slide: "Slide over the pair: left the student, right the teacher, from the same noise.",
    share: "how much of the student is shown",
    gallery: "Gallery",
    drop: "Kept until this page is closed. Drop a PNG made here anywhere on the page to restore its settings, or",
    open: "open one",
    waiting: "waiting",
    preview: "preview after step 1",
    done: "done",
    steps: (n) => `${n} step${n === 1 ? "" : "s"}`,
    clock: (p) => (p.preview ? `preview ${p.preview} s · ` : "") + `${p.total} s`,
    working: (p) => `${p.done} of ${p.all} done`,
    finished: (p) => `${p.all} done in ${p.seconds} s`,
    cancelled: "cancelled",
    restored: "settings restored",
    foreign: "this file holds no settings of ours",
    restore: "Use settings",
    download: "Save PNG",
    needKey: "This server needs a key: enter it below.",
    full: (p) => `The server is full; try again in ${p.seconds} s.`,
    unreachable: "The server cannot be reached.",
    square: "square", wide: "wide", tall: "tall", large: "large", four: "four at once",
  },
  zh: {
    about: "两步出图：第一步预示画面，第二步使其清晰。",
    toy: "这是内置的玩具模型：只会画 64 像素的表情符号场景。它演示服务器如何工作，并不代表两步模型的画质。",
    theme: "浅色 / 深色",
    prompt: "提示词",
    mode: "生成",
    one: "图片",
    pair: (p) => `${p.fast} 步对比 ${p.slow} 步`,
    model: "模型",
    presets: "预设",
    size: "尺寸",
    width: "宽度（像素）",
    height: "高度（像素）",
    seed: "种子",
    dice: "换一个种子",
    fresh: "每次更换",
    count: "数量",
    key: "API 密钥",
    go: "生成",
    cancel: "取消",
    empty: "还没有图片。选一个例子，或写下提示词。",
    slide: "拖动滑块比较：左为学生模型，右为教师模型，噪声相同。",
    share: "学生图所占比例",
    gallery: "图库",
    drop: "关闭页面前一直保留。把在此生成的 PNG 拖到页面上即可恢复其设置，或",
    open: "打开文件",
    waiting: "等待中",
    preview: "第一步后的预览",
    done: "完成",
    steps: (n) => `${n} 步`,
    clock: (p) => (p.preview ? `预览 ${p.preview} 秒 · ` : "") + `${p.total} 秒`,
    working: (p) => `已完成 ${p.done} / ${p.all}`,
    finished: (p) => `${p.all} 张，用时 ${p.seconds} 秒`,
    cancelled: "已取消",
    restored: "设置已恢复",
    foreign: "此文件不含本页的设置",
    restore: "使用设置",
    download: "保存 PNG",
    needKey: "此服务器需要密钥，请在下方输入。",
    full: (p) => `服务器已满，请 ${p.seconds} 秒后再试。`,
    unreachable: "无法连接服务器。",
    square: "方形", wide: "横幅", tall: "竖幅", large: "大图", four: "一次四张",
  },
};

const EXAMPLES = {
  toy: [
    "two cats on a red background",
    "a bus to the left of a doughnut on a yellow background",
    "三枚火箭，橙色背景",
    "一只猫在一只狗的左边，紫色背景",
  ],
  other: [
    "a lighthouse on a cliff at dusk, long exposure, soft light",
    "a tabby cat asleep on a stack of old books, watercolour",
    "清晨的江南水乡，薄雾，小桥流水，摄影",
    "一只戴着飞行员眼镜的柴犬，水彩画",
  ],
};

let language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";

export const current = () => language;

export function setLanguage(name) {
  language = name;
}

export function word(key, value) {
  const found = WORDS[language][key];
  return typeof found === "function" ? found(value) : found;
}

export const examples = (toy) => EXAMPLES[toy ? "toy" : "other"];
