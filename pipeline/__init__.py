"""Both stages: data, networks, the teacher's pass, the student's training and evaluation."""
