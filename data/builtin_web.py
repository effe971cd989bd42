"""Templates of the built-in "web" pages: stories, letters, recipes, news, talk.

What the marks mean is in `builtin_words.py`. Every page has enough choices that no two are alike,
and keeps to what it has said: a person, a thing or a number that comes back is the same one.
"""

STORIES = (
    """<Opening> <Wish> <Event>

<Meeting> <Event2> <Outcome> <Ending>""",
    """<Opening> <Event> <Event2>

<Wish> <Meeting>

<Outcome> <Ending>""",
    """The Lost <Thing>

<Name> lived in <town> with <his> <relation>. [One <day>|One <weather> <daytime>|On a <day> in \
<month>], <he> could not find <his> <colour> <thing>. <He> looked <spot>, but there was only \
<a_look> <thing2>. <He> looked in the <room2> and found nothing.

"Have you seen my <thing>?" <he> asked <name2>.

"I saw <a_colour> <thing> near the <place>," said <name2>. So they went to the <place> together. \
<Event> At last they found out what had happened: <lost>. <Name> was <mood> [and thanked \
<name2>|and gave <name2> <a_fruit>|and smiled]. <Ending>""",
    """[Once upon a time|Long ago|Many years ago], <a_animal> lived near <a_land>. The <animal> \
was <kind> but often <gloom>, because it had no friends. [Every <daytime>|Every <day>] it walked \
to the <land> and looked at the water.

One day <a_animal2> came by. "Why are you so <gloom>?" asked the <animal2>.

"Nobody talks to me," said the <animal>.

"I will talk to you," said the <animal2>, "if you show me where the <fruit_s> grow." The <animal> \
[agreed at once|thought about it and agreed|was glad to help]. They walked <direction> for \
<number> days, and they talked [all the way|about the <season>|about everything they saw]. When \
they came to the <fruit_s>, the <animal2> shared them, and the <animal> was not <gloom> any \
more.""",
    """<Name> was <a_kind> <job> in <town>. <Event> <Event2> In the <daytime> <he> came to the \
<place>, where <name2> was waiting with <a_look> <thing>.

"I made this <thing> for you," said <name2>. "It is made of <material>."

<Name> [did not know what to say|was very surprised|took it <manner>]. Nobody had ever given <him> \
<a_thing>. <He> put it [on the table|next to the window|into <his> bag] and looked at it for a \
long time. <Ending>""",
    """The storm came from the <direction>. <Name> and <name2> were on the <land>, far from \
<town>, and their boat was [small|old|full of water]. "<Kind> people do not give up," said <name>, \
and <he> took the <thing> in both hands. The wind blew for <number> hours. [The sail broke.|The \
waves were as high as a house.|The sky was as black as night.]

Then <name2> saw a light. It was <a_job> with <a_colour> lamp, who had heard them from the \
<place>. <He2> shouted, and the <job> threw them a rope. [Soon they sat by a warm stove and drank \
<drink>.|They were safe at last.] "Next time," said the <job>, "stay at home when it is \
<weather>." <Ending>""",
    """On <day> <name> went to the market in <town>. <He> had <price> coins and wanted to buy \
[<food> and <vegetable_s>|<a_look> <thing> and some <food>|<a_thing> for <his> <relation>]. \
<Name2>, who sold <fruit_s>, called <him>: "Come here, my <fruit_s> are the best!"

<Name> took <n> <fruit_s>. <Name2> gave <him> <n2> more, so now <he> had <n+n2> <fruit_s>. <Event> \
On the way home <he> gave <n2> of them to a <kind> boy, and so there were <n> left. <His> \
<relation> [counted them and smiled|made a cake with them|put them into <a_look2> basket]. \
<Ending>""",
    """<Name>'s <relation> was <oldage> years old and had been <a_job> in <town> for a long time. \
[Every <season>|Every <day>|In <month>] <name> went there by <vehicle> and stayed for <number> \
days. They [played <game>|baked <food>|painted the <room>|looked at old photographs] and talked \
about the time when there was no <place> in <town>.

"When I was young," the <relation> said, "we had only one <thing>, and it was made of <material>. \
[We shared it.|We were <mood> all the same.|Nobody complained.]" <Name> tried to imagine it. \
<Event> <Ending>""",
    """The race began at <hour> o'clock. <Name>, <name2> and <name3> stood at the line near the \
<place>. <Name> had <colour> shoes, <name2> had <colour2> shoes and <name3> had none at all. [The \
whole of <town>|Half the school|A big crowd] was there.

At first <name2> was the fastest. But by the <tree> tree <he2> fell over <a_animal>. <Name3> \
[stopped to help <him2>|did not look back|laughed], and <name> ran past [both of them|them \
<manner>]. In the end <name> was first, <name3> was second and <name2> was third. The prize was \
<a_colour3> <thing>. <Name> was <mood> and shared [the cake|some <fruit_s>|a bottle of <drink>] \
with the others.""",
    """Every night <a_animal> came into the garden of <name> and ate the <vegetable_s>. <Name> \
tried [<a_thing>|a fence of <material>|a big bell]. It did not help. <His> neighbour, <a_kind> \
<job>, said: "Give it some <food>, then it will leave your <vegetable_s> alone."

So <name> put some <food> under the <tree> tree. The next morning the <food> was gone, and all the \
<vegetable_s> were still there. After <number> weeks the <animal> was so tame that it [slept in \
the <room>|ate out of <his> hand|followed <him> to the <place>]. <Name> called it <surname>, \
[because it looked like <his> teacher|after <his> old doctor|and nobody knew why]. <Ending>""",
    """Diary, <date> <month>

Today was [a good|a strange|a long|a quiet] day. In the morning it was <weather>, so I [stayed in \
the <room>|went to the <place>]. I met <name> there. <He> told me that <his> <relation> is now \
<a_job> in <town>. Then we [played <game>|drank <drink>|talked about <subject>] until <hour> \
o'clock.

In the <daytime> I had to <chore>. I was <mood>, but I did it. Tomorrow I want to <chore2>. Good \
night.""",
    """There was once <a_look> <thing> that could speak. It stood in the <room> of <a_job>, and \
nobody knew its secret. One <daytime> <name> came to the house and heard a voice: "Please take me \
to the <land>!"

"Who is there?" asked <name>. "Only me, the <thing>," said the voice. <Name> was [<mood>, but also \
curious|not afraid|very surprised]. <He> took the <thing> under <his> arm and walked to the \
<land>. <Event> <Event2> When the <thing> saw the <land>, it [began to sing|was silent for a \
while|laughed]. "Thank you," it said. "Now I have seen it." <Ending>""",
)

LETTERS = (
    """Dear <name>,

[Thank you for your letter.|I hope you are well.|How are you?|I was glad to hear from you.] Here \
in <town> it is <weather>, and the <flower_s> are out. Last <day> I visited <name2>, who has \
<a_size> <pet> now. <He2> calls it <surname>. We [went to the <place>|walked to the <land>|played \
<game> all day] and had <food> and <drink>.

Could you send me [my <colour> <thing>|the recipe for your <food>|a picture of your <pet2>]? I \
left it <spot>. I will come to you in <month>, if the <vehicle> is not too expensive.

[With love|Best wishes|Your friend|Many greetings],
<name3>""",
    """To: <surname3> and Sons, <town>
Subject: [Lost|Broken|Wrong] <thing>

Dear Mr <surname>,

On <date> <month> I bought <a_colour> <thing> in your shop. When I came home, I saw that it was \
[broken|the wrong colour|too small|made of <material> and not of <material2>]. I called you on \
<day>, but nobody answered.

Please [send me a new one|give me my money back|tell me what to do]. You can reach me at <n> \
<Tree> Street, <town>.

Yours sincerely,
<name> <surname2>""",
    """Greetings from <town>! We came by <vehicle> and are staying [in a small inn|with my \
<relation>|near the <place>] until <day>. The <land> is beautiful, and it is <weather> every \
<daytime>. Yesterday we saw <a_animal> and <number> <animal2_s>. <Name> [eats <food> all day|has \
lost <his> <thing>|wants to stay for ever]. See you in <month>!

<Name2>""",
    """From: <name> <surname>
To: <name2> <surname2>
Subject: [Party|Dinner|Meeting|Trip] on <day>

Hello <name2>,

Would you like to come to [my house|the <place>|the <land>] on <day> at <hour> o'clock? <Name3> \
and <his> <relation> will be there too. [I will bring <food> and <drink>.|Please bring some \
<food>.|There will be <fruit> cake.] If it is <weather>, we will meet [in the <room>|at the \
<place2>|a day later]. Please answer before <day2>.

[See you soon|Best wishes|Yours],
<name>""",
    """Dear <Relation>,

My first week at the school in <town> is over. My room is <size> and has a view of the <land>. I \
share it with <name>, who is <age> years old and likes <subject> and <game>. <He> is <kind>, but \
<he> talks in <his> sleep.

On <day> we have <subject2> at <n> o'clock, and then <subject3>. The <subject2> teacher is \
<a_kind2> man with <a_colour> <thing>. The food is [good|not bad|always the same]: <food> and \
<vegetable_s>, and <drink> on <day2_s>. Please send me [my <thing2>|some <food2>|a warm scarf].

Your <name2>""",
)

GUIDES = (
    """[Grandmother's|Simple|Quick|The best] <Vegetable> Soup

You need:
- <n> <vegetable_s>
- <n2> <vegetable2_s>
- <grams> grams of <food>
- some <herb> and salt

Wash the <vegetable_s> and cut them [into small pieces|in half|into thin slices]. Cook them in \
<a_size> pot for <minute> minutes. Then add the <vegetable2_s> and [stir <manner>|wait until they \
are soft|cook for ten more minutes]. Put in the <herb> at the end. Serve the soup hot, with the \
<food>. It is enough for <number> people.""",
    """How to Bake <Fruit> Cake

For the dough take <grams> grams of flour, <grams2> grams of sugar and <n> eggs. Mix them in \
<a_size> bowl and add a cup of <drink>. [Let the dough rest for <minute> minutes.|Do not stir too \
long.|The dough should be soft.] Wash <n2> <fruit_s>, cut them and put them on the dough. Bake the \
cake for <minute2> minutes, until it is golden. [Let it cool <spot>.|Eat it while it is \
warm.|Serve it with <drink2>.]

Tip: <name> from <town> uses <fruit2_s> instead of <fruit_s>. <Opinion>""",
    """How to Grow <Flower_s>

<Flower_s> like a <weather> place and a little water. Plant them in <month>, when the ground is \
[soft|not too cold|dry]. Make a hole with <a_thing>, put in the seed and cover it with earth. \
Water it every <day>. After <number> weeks you will see the first leaf. [Cut the flower in \
<month2>.|Keep the <animal_s> away.|Do not plant them near <a_tree> tree.] In <season> the garden \
will be full of <colour> <flower_s>.""",
    """How to Repair <a_look> <thing>

What you need: a brush, some glue, a piece of <material> and <minute> minutes of time.

1. Clean the <thing> <manner>.
2. Look for the broken part. It is often [on the back|at the bottom|on the left side].
3. Put glue on the <material> and press it on.
4. Wait until it is dry. On a <weather> day this takes <number> hours.
5. Paint it <colour> [or <colour2>|if you like|again].

If it breaks again, ask <a_job>. [A new one costs <price> pounds.|Do not throw it away!]""",
    """<Town> in One Day

Begin your day at the <place>, which opens at <hour> o'clock. The <food> there is [famous|very \
good|cheap]. Then walk <direction> to the <land>; it takes <minute> minutes. If it is <weather>, \
go to the <place2> instead, where you can see <a_look> <thing> from <year>. In the <daytime> take \
the <vehicle> to the old <place3>. <Remark> A room at the <Tree> Inn costs <price> pounds a night. \
<Opinion>""",
)

REPORTS = (
    """<Town>, <date> <month>. The <season> festival in <town> [was a great success|began on \
<day>|drew many visitors]. More than <hundred> people came to the <place> to hear music and eat \
<food>. The <job> <name> <surname> won the first prize for <his> <size> <vegetable>, which weighed \
<grams> grams. "I am very <mood>," <he> said. "I give it <drink> every <daytime>." [The mayor gave \
<him> <a_colour> <thing>.|The second prize went to <name2>.]""",
    """Weather for <day>: in the morning it will be <weather> in <town> and <weather2> in <town2>. \
In the afternoon the wind will come from the <direction>, with <n+n2> degrees by the <land> and \
<n> degrees on the hills. [Take an umbrella.|Drivers should be careful.|Farmers should cover their \
<vegetable_s>.] On <day2> it will be <weather3> everywhere. The coldest place yesterday was \
<town3> with <n2> degrees.""",
    """<Town> and <town2> played <game> on <day>. After <minute> minutes <town> led by <n>, but \
then <name> <surname>, who is <a_job> in <town2>, [made three points|woke up|could not be \
stopped]. The <weather> day made it hard for both teams. Then the players [went to the \
<place>|drank <drink> together]. They meet again in <month>, then in <town2>.""",
    """New <place> in <town>

After <number> years of work, the new <place> in <town> opened on <date> <month>. It is built of \
<material> and <material2> and cost <hundred> thousand pounds. The architect, <name> <surname>, \
said that <he> wanted [a bright house for everybody|a place like <a_land>|a simple roof]. Not \
everyone is <mood>: "The old one was more beautiful," said <name2>, <a_job> who lives next door. \
It is open every day but <day>.""",
    """Thief caught in <town>

A thief who had taken <a_colour> <thing> from the <place> was caught on <day>. <Name> <surname>, \
<oldage>, heard a noise in the <daytime> and saw [a man with a bag|somebody behind <a_tree> \
tree|an open window]. <He> called the police and waited. It turned out that the thief was \
<a_animal>. It had also taken <n> <fruit_s> and <a_thing2>. The owner was <mood>, and the <animal> \
now lives in the zoo of <town2>.""",
    """The <place> club of <town> met on <date> <month> at <hour> o'clock. Present: <name> \
(chair), <name2>, <name3> and <name4>. <Name2> reported that the <thing> had been repaired for \
<price> pounds. <Name3> asked who would <chore>; <name4> offered to do it. It was agreed to buy \
<number> <colour> <thing2_s>. The next meeting is on <day>.""",
    """<Name> <surname> was born in <town> in <year>, the child of <a_job> and <a_job2>. As a \
child <he> liked <subject> and <game>. At the age of <age> <he> saw <a_thing> made of <material> \
and [could think of nothing else|decided to become <a_job3>|took it apart]. Later <he> moved to \
<town2> and worked there as <a_job3> for <number> years. <He> wrote a book about <animal_s>, which \
is still read. <His> house near the <place> is now a museum. <He> died at the age of <oldage>.""",
    """The <animal> is <a_size> animal that lives near <a_land>. It eats <fruit_s> and \
<vegetable_s>, and in <season> it also eats [insects|small fish|leaves]. A young <animal> stays \
with its mother for <number> months. The <animal> is <colour>, with <a_colour2> tail. [It sleeps \
by day and is awake at night.|It can live for <minute> years.|It is seldom seen.] In <town> people \
say that <a_animal> by the door brings luck. Its greatest enemy is the <animal2>.""",
    """<Town> is a town by the <land>, <minute> miles <direction> of <town2>. It was founded in \
<year> by <a_job>. Today it has <n> schools, <a_place> and <n2> churches. <Remark> <Remark2> The \
town is known for its <flower_s> and for its <food>. Its flag shows <a_animal> on <a_colour> \
field. The <vehicle> to <town2> goes <n> times a day. <Remark3>""",
    """[Review:|My opinion:|Tested:] the <thing> by <surname> and Sons

I bought this <colour> <thing> in <month> for <price> pounds. It is made of <material>, <size> and \
[easy|hard] to use. My <relation> uses it in the <room> every <daytime>. After <number> weeks [it \
still looks new|the colour came off|it broke], but the shop in <town> [was helpful|sent me another \
one|did not answer]. <Opinion> I give it <n> points out of ten.""",
    """The book "The <Colour> <Thing>" by <name> <surname> tells of <a_kind> <job> in <town> who \
finds <a_thing2> and must bring it to the <land>. On the way there <a_animal> helps. I liked the \
<ordinal> chapter best, when it is <weather> and everybody waits in the <place>. The end made me \
<mood>. [It is a good book for children of <age>.|The pictures are by <name2> <surname2>.|It has \
<hundred> pages.] <Opinion>""",
    """Wanted: <a_kind> <job> for our <place> in <town>. You work from <day> to <day2> and begin \
at <n> o'clock. You should like <subject> and <animal_s>, and you must be able to <chore> and to \
<chore2>. We pay <hundred> pounds a week and give you <food> and <drink>. [A room is free.|You can \
come by <vehicle>.] Please write to Mrs <surname>, <n2> <Flower> Road.""",
)

DIALOGUES = (
    """"Good <daytime>," said <name>. "Do you have any <fruit_s>?"
"Yes, we have. How many would you like?" asked the <job>.
"<N>, please. And <a_thing>, if you have one."
"I have <a_colour> one and <a_colour2> one. Which do you want?"
"The <colour2> one, please. How much is it?"
"<Price> pounds."
"[That is a lot.|That is fine.|My <relation> paid less.]"
"[It is made of <material>.|The <fruit_s> are free today.|It comes from <town>.]"
So <name> took the <colour2> <thing> and went out <manner>.""",
    """At the station of <town>

<Name>: When does the next <vehicle> to <town2> leave?
Clerk: At <hour>:<minute>, from platform <n>.
<Name>: Is it [on time|full|direct]?
Clerk: [Yes, it is.|I think so.|Not on <day_s>.] It takes <minute2> minutes.
<Name>: And how much is a ticket?
Clerk: <Price> pounds. Your <pet> can go for free.
<Name>: Good. Then <n2> tickets, please. My <relation> and my friends are coming too.
Clerk: Here you are. Have a good <daytime>!""",
    """<Name>: What are you doing in the <room>?
<Name2>: I have to <chore>. And you?
<Name>: I wanted to ask you about <subject>. We have a test on <day>.
<Name2>: Ask <name3>. <He3> is better at <subject> than I am.
<Name>: <He3> is [ill|at the <place>|in <town>]. Please help me!
<Name2>: All right. But then you <chore2> for me.
<Name>: [Of course.|If I must.|That is not fair!] Shall we meet at <hour>?
<Name2>: Yes, at <hour>, and bring some <food>.""",
    """"What is the matter?" asked the doctor. "I cannot sleep," said <name>. "Since <month> there \
has been <a_animal> in my <room>, and it [sings|dances|talks to my <pet>] all night." The doctor \
looked at <him> <manner>. "Drink a cup of <drink> at <hour> o'clock and eat <n> <fruit_s> a day," \
said the doctor. "And the <animal>?" asked <name>. "Give it some <fruit_s> too." A week later the \
<animal> slept, and so did <name>.""",
    """Question from <name>, <town>: My <tree> tree is <n> years old and has no leaves. I water it \
every <day>. What is wrong?

Answer from <name2>, <job>: [Too much water is bad for it.|It may need more light.|The ground is \
too cold.] Wait until <month>, then cut it with <a_look> knife. If you find <animal_s> in it, put \
some <herb> around it.

<Name>: Thank you, I will try that.

<Name3>: It did not work for me. <Opinion>""",
    """Frequently asked questions about our <place>

When is the <place> open? It is open from <n> o'clock on every day but <day>.
Where is it? It is in <town>, next to the <place2>, <minute> minutes from the <land>.
What does it cost? A ticket costs <price> pounds. Children under <age> pay nothing.
Can I bring my <pet>? [Yes, if it is quiet.|No, sorry.|Only on <day2>.]
Who can help me? Ask <name> <surname>. <He> speaks <number> languages and is always <kind>.""",
)

READING = (
    """<Name> is <age> years old and lives in <town>. <He> has <a_colour> <thing> and <a_pet> \
called <surname>. On <day> <he> goes to the <place> with <his> <relation>.

Question: Where does <name> live?
Answer: <town>
Question: What colour is the <thing>?
Answer: <colour>
Question: How old is <name>?
Answer: <age>
Question: When does <name> go to the <place>?
Answer: on <day>""",
    """In the <room> there are three boxes. The <colour> box is full of <fruit_s>, the <colour2> \
box is full of <thing_s>, and the <colour3> box is empty. The <colour> box belongs to <name>, the \
<colour2> box belongs to <name2>.

Question: What is in the <colour2> box?
Answer: <thing_s>
Question: Which box is empty?
Answer: the <colour3> box
Question: Is the <colour> box empty?
Answer: no
Question: Who owns the <fruit_s>?
Answer: <name>""",
    """The <vehicle> from <town> to <town2> leaves at <hour>:<minute> and costs <price> pounds. \
The <vehicle2> is slower, but it costs only <n> coins. <Name> takes the <vehicle>, and <name2> \
takes the <vehicle2>.

Question: Who takes the <vehicle2>?
Answer: <name2>
Question: How much does the <vehicle> cost?
Answer: <price> pounds
Question: Does <name> take the <vehicle>?
Answer: yes
Question: Where does the <vehicle> go?
Answer: to <town2>""",
    """<Name>, <name2> and <name3> work in <town>. <Name> is <a_job>, <name2> is <a_job2> and \
<name3> is <a_job3>. In <season> they meet at the <place> and play <game>. <Name3> \
[always|often|never] wins.

Q: What is the job of <name2>? A: <job2>
Q: Who is the <job>? A: <name>
Q: Where do they meet? A: at the <place>
Q: What do they play? A: <game>
Q: Is <name3> <a_job>? A: no""",
    """At the zoo of <town> there are <n> <animal_s>, <n2> <animal2_s> and <n3> <animal3_s>. The \
<animal_s> live by the <land>, and the <animal2_s> live in <a_look> house of <material>. They eat \
<fruit_s> in the <daytime>.

Q: How many <animal_s> are there? A: <n>
Q: How many <animal_s> and <animal2_s> are there together? A: <n+n2>
Q: Where do the <animal_s> live? A: by the <land>
Q: What do they eat? A: <fruit_s>
Q: What is the house of the <animal2_s> made of? A: <material>""",
    """The <Colour> <Thing> (a song from <town>)

I had <a_thing> of <colour> and gold,
<a_thing> so <look>, <a_thing> so old.
I gave it to <name> on a <weather> day,
and <he> took the <thing> and carried it away.

Oh, bring back my <thing> from the <land> to me,
I wait by the <place> under the <tree> tree.
[The <flower_s> are sleeping, the <animal_s> are too|The <season> is over, the sky is still blue],
and all that I want is the <thing> and you.""",
)

TEMPLATES = STORIES + LETTERS + GUIDES + REPORTS + DIALOGUES + READING
