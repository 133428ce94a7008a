from classroom.questions import main

main()
